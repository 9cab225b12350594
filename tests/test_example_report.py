"""docs/example_report is what this program makes: not the page of an earlier one."""

import re
from pathlib import Path

from sentinode.manifests import SCHEMAS, read_report

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "example_report"


def test_the_example_has_every_figure_and_every_section_of_today() -> None:
    report = read_report(EXAMPLE)
    assert set(report.model_dump()) == set(SCHEMAS["report"].model_fields)
    page = (EXAMPLE / "report.html").read_text()
    sections = set(re.findall(r'<section id="(\w+)"', (ROOT / "ray_jobs" / "templates" / "report.html").read_text()))
    assert set(re.findall(r'<section id="(\w+)"', page)) == sections - {"comparison"}
    assert report.headline in page
    assert report.bundle["digest"] in (EXAMPLE / "model_card.md").read_text()


def test_the_example_s_card_has_every_heading_of_today() -> None:
    headings = re.findall(r"^## .+$", (ROOT / "sentinode" / "model_card.py").read_text(), re.MULTILINE)
    assert headings
    assert re.findall(r"^## .+$", (EXAMPLE / "model_card.md").read_text(), re.MULTILINE) == headings
