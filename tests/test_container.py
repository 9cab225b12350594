"""The container image's recipe: what it may hold, who it runs as. No container engine is needed; what one would say is not tested here."""

import re
from pathlib import PurePath

import pytest

from tests.processes import ROOT

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """Instructions and their arguments, continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of each named stage, with those of the stage that it is made from before them."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for instruction, rest in instructions():
        if instruction == "FROM":
            source, _, name = rest.partition(" AS ")
            found[name] = list(found.get(source, []))
        elif name:
            found[name].append((instruction, rest))
    return found


def of(stage: str, instruction: str) -> list[str]:
    return [rest for name, rest in stages()[stage] if name == instruction]


def test_there_is_an_image_for_cpus_and_one_for_gpus() -> None:
    assert {"cpu", "gpu"} <= stages().keys()
    assert any("NVIDIA_VISIBLE_DEVICES" in rest for rest in of("gpu", "ENV"))
    assert not any("NVIDIA" in rest for rest in of("cpu", "ENV"))


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_it_runs_as_an_ordinary_user(stage: str) -> None:
    user = of(stage, "USER")[-1]
    # By number: Kubernetes' runAsNonRoot cannot judge names.
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f"--uid {user.partition(':')[0]}" in " ".join(of(stage, "RUN"))
    assert stages()[stage][-1][0] != "RUN"


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_ray_in_it_asks_for_a_token_and_the_command_gets_signals(stage: str) -> None:
    assert any("RAY_AUTH_MODE=token" in rest for rest in of(stage, "ENV"))
    assert of(stage, "ENTRYPOINT") == ['["sentinode"]']


def test_what_it_is_made_from_is_pinned_and_only_packages_of_the_constraints_are_installed() -> None:
    (base,) = (rest for name, rest in instructions() if name == "ARG" and rest.startswith("BASE="))
    assert re.fullmatch(r"BASE=python:3\.11-slim-bookworm(@sha256:[0-9a-f]{64})?", base)
    froms = [rest.partition(" AS ")[0] for name, rest in instructions() if name == "FROM"]
    assert set(froms) <= {"${BASE}", *stages()}
    installs = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    assert installs
    assert all("--constraint constraints.txt" in rest for rest in installs)
    for rest in (rest for name, rest in instructions() if name == "RUN" and "apt-get install" in rest):
        assert "--no-install-recommends" in rest
        assert "rm -rf /var/lib/apt/lists/*" in rest


def test_nothing_is_fetched_by_hand_and_no_secret_has_a_place() -> None:
    names = {name for name, _ in instructions()}
    assert "ADD" not in names
    assert not re.search(r"\b(curl|wget)\b|https?://", "\n".join(rest for _, rest in instructions()))
    set_here = " ".join(rest for name, rest in instructions() if name in ("ARG", "ENV"))
    assert not re.search(r"(TOKEN|PASSWORD|SECRET|API_KEY|ACCESS_KEY)\w*=", set_here)


def test_the_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = set()
    for name, rest in instructions():
        if name == "COPY" and "--from=" not in rest:
            copied |= {PurePath(word).parts[0] for word in rest.split()[:-1] if not word.startswith("--")}
    assert copied == allowed
    assert [path for path in copied if not (ROOT / path).exists()] == []
    assert not {".git", ".venv", "out", "demo", "tests"} & allowed
