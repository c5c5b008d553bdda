from __future__ import annotations

import jinja2
import pytest

from routed_peft.report.page import environment, inline


def test_own_templates_may_import_those_of_the_library(tmp_path):
    text = '{% from "numbers.html.jinja" import listed %}{{ listed(values) }}, {{ 0.5 | percent }}, {{ name }}'
    (tmp_path / "mine.html.jinja").write_text(text)
    template = environment(tmp_path).get_template("mine.html.jinja")
    assert template.render(values={"a": 1}, name="<b>") == "a 1, 50 %, &lt;b&gt;"
    with pytest.raises(jinja2.UndefinedError, match="name"):
        template.render(values={})
    with pytest.raises(jinja2.TemplateNotFound):
        environment().get_template("mine.html.jinja")


def test_pictures_are_within_the_page():
    assert inline(b"<svg/>") == "data:image/svg+xml;base64,PHN2Zy8+"
