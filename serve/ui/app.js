"use strict";
// One patch at a time goes to the endpoint's own routes; the answers are shown as they are, numbers unrounded on hover.

const $ = (id) => document.getElementById(id);
const AT_A_TIME = 4;
const TRIES = 6;
const REASONS = {
  low_confidence: "The model is not sure: its probability is near the middle.",
  near_threshold: "The probability is near the threshold, where small changes turn the answer.",
  no_tissue: "The patch shows no stained tissue.",
  unusual_colours: "Its colours are unlike those of the patches that the model was validated on.",
  wrong_spacing: "Its pixel size differs from what the model was trained on.",
  unknown_spacing: "Its pixel size was not given.",
};
const MAP_NOTE = $("map-note").textContent;
const items = [];
let selected = null;
let key = sessionStorage.getItem("sentinode-key") || "";
let running = 0;

function headers() { return key ? { "X-API-Key": key } : {}; }

async function ask(path, options = {}) {
  for (let tried = 1; ; tried += 1) {
    let response = null;
    try {
      response = await fetch(path, { ...options, headers: headers() });
    } catch (error) {
      if (tried >= TRIES) throw new Error("The endpoint cannot be reached.");
    }
    if (response && ![408, 429, 500, 502, 503, 504].includes(response.status)) return response;
    if (response && tried >= TRIES) return response;
    const wait = response ? Number(response.headers.get("Retry-After")) || tried : tried;
    await new Promise((done) => setTimeout(done, wait * 1000));
  }
}

async function problemOf(response) {
  let detail = `The endpoint answered ${response.status}.`;
  try { ({ detail } = await response.json()); } catch (error) { /* not from our code */ }
  if (response.status === 401) {
    $("key-problem").textContent = key ? detail : "";
    $("key-form").hidden = false;
    $("key").focus();
  }
  return detail;
}

function formOf(file) {
  const form = new FormData();
  form.append("file", file, "patch"); // the file's name stays here
  return form;
}

async function predict(item) {
  try {
    const response = await ask("v1/predict", { method: "POST", body: formOf(item.file) });
    if (response.ok) { item.answer = await response.json(); item.problem = null; }
    else item.problem = await problemOf(response);
  } catch (error) { item.problem = error.message; }
}

async function picture(item, opacity) {
  const response = await ask(`v1/explain?opacity=${opacity}`, { method: "POST", body: formOf(item.file) });
  if (!response.ok) throw new Error(await problemOf(response));
  return URL.createObjectURL(await response.blob());
}

async function work() {
  while (running < AT_A_TIME) {
    const item = items.find((one) => !one.begun);
    if (!item) return;
    item.begun = true;
    running += 1;
    predict(item).then(() => {
      running -= 1;
      item.done = true;
      work();
      if (!items.includes(item)) return; // cleared meanwhile
      show();
      if (selected === null) select(item);
      else if (selected === item) showDetail();
    });
  }
}

function add(files) {
  for (const file of files) items.push({ file, begun: false, done: false, answer: null, problem: null, patch: null, map: null });
  show();
  work();
}

function shown() { return $("only-review").checked ? items.filter((one) => one.problem || (one.answer && one.answer.needs_review)) : items; }

function element(name, text, kind) {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function show() {
  const done = items.filter((one) => one.done).length;
  const review = items.filter((one) => one.answer && one.answer.needs_review).length;
  const failed = items.filter((one) => one.problem).length;
  $("list-area").hidden = items.length === 0;
  $("status").textContent = items.length ? `${done} of ${items.length} answered, ${review} to review${failed ? `, ${failed} not usable` : ""}` : "";
  $("list").replaceChildren(...shown().map((item) => {
    const row = document.createElement("li");
    row.id = `item-${items.indexOf(item)}`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", String(item === selected));
    row.append(element("span", item.file.name, "name"));
    const answer = item.answer;
    row.append(element("span", answer ? `${answer.prediction}  ${percent(answer.probabilities.Metastatic)}` : item.problem ? "-" : "…", "value"));
    if (item.problem) row.append(element("span", item.problem, "flag problem"));
    else if (answer && answer.needs_review) row.append(element("span", "to review", "flag"));
    row.addEventListener("click", () => select(item));
    return row;
  }));
  if (selected) $("list").setAttribute("aria-activedescendant", `item-${items.indexOf(selected)}`);
}

function percent(probability) { return `${(100 * probability).toFixed(1)} %`; }

function select(item) {
  selected = item;
  show();
  const row = $(`item-${items.indexOf(item)}`);
  if (row) row.scrollIntoView({ block: "nearest" });
  showDetail();
}

function list(target, rows) {
  target.replaceChildren(...rows.flatMap(([name, value, title]) => {
    const term = element("dt", name);
    const detail = element("dd", value);
    if (title) detail.title = title;
    return [term, detail];
  }));
}

function showDetail() {
  const item = selected;
  $("empty").hidden = item !== null;
  $("detail").hidden = item === null;
  if (item === null) return;
  const answer = item.answer;
  $("map-note").textContent = MAP_NOTE;
  $("map-note").classList.remove("problem");
  $("file-name").textContent = item.file.name;
  $("problem").hidden = !item.problem;
  $("problem").textContent = item.problem || "";
  for (const id of ["decision", "scale", "numbers"]) $(id).hidden = !answer;
  $("review").hidden = !(answer && answer.needs_review);
  for (const name of ["patch", "map"]) { if (item[name]) $(name).src = item[name]; else $(name).removeAttribute("src"); }
  if (!answer) return;
  const probability = answer.probabilities.Metastatic;
  $("decision").textContent = answer.prediction;
  $("decision").className = `decision ${answer.prediction.toLowerCase()}`;
  $("bar").style.width = `${100 * probability}%`;
  $("threshold-mark").style.left = `${100 * answer.threshold}%`;
  list($("numbers"), [
    ["Probability of Metastatic", percent(probability), String(probability)],
    ["Threshold", percent(answer.threshold), String(answer.threshold)],
    ["Confidence in the answer", percent(answer.confidence), String(answer.confidence)],
    ["Model", `${answer.model.name} ${answer.model.version}, ${answer.model.digest.slice(0, 12)}`, answer.model.digest],
    ["Request", answer.request_id],
  ]);
  $("reasons").replaceChildren(...answer.review_reasons.map((reason) => element("li", REASONS[reason] || reason)));
  loadPictures(item);
}

async function loadPictures(item) {
  if (item.loading) return;
  item.loading = true;
  try {
    for (const [name, opacity] of [["patch", 0], ["map", 1]]) {
      item[name] = item[name] || await picture(item, opacity);
      if (!items.includes(item)) { URL.revokeObjectURL(item[name]); return; }
      if (selected === item) $(name).src = item[name];
    }
  } catch (error) {
    item.loading = false;
    if (selected === item) { $("map-note").textContent = error.message; $("map-note").classList.add("problem"); }
  }
}

function setOpacity() {
  $("map").style.opacity = $("opacity").value / 100;
  $("opacity-value").textContent = `${$("opacity").value} %`;
}

function interval(metrics, name) {
  const range = (metrics.group_intervals || {})[name];
  const value = metrics[name];
  if (typeof value !== "number") return null;
  return value.toFixed(4) + (range ? ` (${range[0].toFixed(4)} to ${range[1].toFixed(4)})` : "");
}

async function loadCard() {
  const response = await ask("v1/model");
  if (!response.ok) { await problemOf(response); return; }
  const card = await response.json();
  $("notice").textContent = card.notice;
  $("accepts").textContent = `TIF, PNG, JPEG or WebP, ${card.patch_size_px} x ${card.patch_size_px} pixels`;
  $("model-name").textContent = `${card.name} ${card.version}`;
  const side = card.patch_size_px;
  document.querySelector(".centre").setAttribute("viewBox", `0 0 ${side} ${side}`);
  for (const axis of ["x", "y"]) $("centre").setAttribute(axis, String((side - 32) / 2));
  list($("card"), [
    ["Digest", card.digest],
    ["Network", `${card.arch}, ${card.input_size_px} px`],
    ["Pixel size", card.spacing_um_px === null ? "not known" : `${card.spacing_um_px} µm`],
    ["Threshold", `${card.threshold} (recall of at least ${card.threshold_rule.target_recall} on validation${card.threshold_rule.reached ? "" : ", not reached with confidence"})`],
    ["ROC-AUC on validation", interval(card.metrics, "roc_auc") || "-"],
    ["Recall, specificity there", [interval(card.metrics, "recall"), interval(card.metrics, "specificity")].filter(Boolean).join(", ") || "-"],
    ["Data", `${card.data.fingerprint.slice(0, 12)}, split by ${card.data.split_method}: ${card.data.leak_meaning}`],
    ["Licence", card.licence],
  ]);
  $("card-area").hidden = false;
}

$("files").addEventListener("change", (event) => { add(event.target.files); event.target.value = ""; });
for (const name of ["dragover", "dragenter"]) document.addEventListener(name, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
document.addEventListener("drop", (event) => { event.preventDefault(); $("drop").classList.remove("over"); add(event.dataTransfer.files); });
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem("sentinode-key", key);
  $("key").value = "";
  $("key-form").hidden = true;
  for (const item of items) if (item.problem) Object.assign(item, { begun: false, done: false, problem: null, loading: false });
  loadCard();
  work();
});
$("list").addEventListener("keydown", (event) => {
  const rows = shown();
  const at = rows.indexOf(selected);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
  if (to === undefined || !rows.length) return;
  event.preventDefault();
  select(rows[Math.max(0, Math.min(rows.length - 1, to))]);
});
$("opacity").addEventListener("input", setOpacity);
$("show-centre").addEventListener("change", () => { document.querySelector(".centre").style.display = $("show-centre").checked ? "" : "none"; });
$("only-review").addEventListener("change", show);
$("clear").addEventListener("click", () => {
  for (const item of items) for (const url of [item.patch, item.map]) if (url) URL.revokeObjectURL(url);
  items.length = 0;
  selected = null;
  show();
  showDetail();
});
setOpacity();
loadCard();
