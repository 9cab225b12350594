"""The words of the data card: what reasons and flags mean, and how figures are written."""

import json

from sentinode import CLASS_NAMES

REASON_MEANING = {
    "missing": "The labels name an id that has no image.",
    "no_label": "An image that the labels do not name.",
    "bad_label": "The label is neither 0 nor 1, or its line has the wrong number of fields.",
    "duplicate_id": "The id stands on several lines of the labels, or several images have it. All of them are refused.",
    "no_slide": "Splitting by slide, and the slide of this patch is not known.",
    "no_split": "The source's own splits were asked for, and this patch is in none of them.",
    "unreadable": "The operating system could not read the file.",
    "blank": "Black or white all over.",
    "id_mismatch": "Ids of this source are the SHA-1 of the pixels, and this one is not: damaged, or renamed.",
    "duplicate_pixels": "Same pixels and label as another id. The smallest id is kept, so nothing is lost.",
    "label_conflict": "Same pixels as another id, but another label. Nobody can say which is right, so all of them are refused.",
    "empty": "The file is empty.",
    "not_an_image": "The bytes are no image.",
    "format_not_allowed": "An image, but of a format that is not accepted.",
    "truncated": "The image ends too early.",
    "decompression_bomb": "A small file that unpacks to far more than a patch; it was not unpacked.",
    "wrong_size": "Not as many pixels wide and high as a patch must be.",
    "wrong_mode": "Not three 8-bit channels.",
    "several_pages": "The file holds more than one image.",
}
"""Reason of a refusal -> what it means, for readers who have not seen the code."""
FLAG_MEANING = {
    "pale": "Hardly any stain: no pixel reaches an HSV saturation of 0.07. Kept because it has a label.",
    "duplicate": "Same pixels and label as another patch of the set; all of them are kept, in one group.",
}
LABELS = {0: CLASS_NAMES[0], 1: CLASS_NAMES[1], -1: "Unlabelled"}
"""Label, -1 for none -> name."""
LONGEST_TEXT = 300
"""A file name or a detail may have any length; the page shows so much of it."""


def count(value: float) -> str:
    """Write a number with commas; one decimal where it is not whole."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def percent(share: float | None) -> str:
    """Write a share, 0..1, with one decimal; never 0.0 % for something or 100.0 % for not quite all."""
    if share is None:
        return "–"
    text = f"{100 * share:.1f}"
    text = "<0.1" if share > 0 and text == "0.0" else ">99.9" if share < 1 and text == "100.0" else text
    return f"{text} %"


def points(difference: float | None) -> str:
    """Write a difference of shares in percentage points, with its sign; none before 0.00."""
    if difference is None:
        return "–"
    text = f"{abs(100 * difference):.2f}"
    sign = "" if text == "0.00" else "+" if difference > 0 else "−"
    return sign + text


def megabytes(size: int) -> str:
    """Write a number of bytes."""
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size / 1e3:,.1f} kB"


def short(text: object, longest: int = LONGEST_TEXT) -> str:
    """Cut a text of unknown length."""
    whole = str(text)
    return whole if len(whole) <= longest else whole[: longest - 1] + "…"


def value(value: object) -> str:
    """Show a setting as JSON does, a text without quotes."""
    return short(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
