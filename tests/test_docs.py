"""python -m fnbp docs: the API pages, what they hold, and what is said without pdoc."""

import html
import inspect
import re
import subprocess
import sys
import webbrowser
from pathlib import Path

import pytest

import fnbp
from fnbp.__main__ import main
from fnbp.rendering import pages as rendering_pages

ROOT = Path(__file__).parents[1]
PUBLIC = [name for name in dir(fnbp) if not name.startswith("_") and not inspect.ismodule(getattr(fnbp, name))]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    pytest.importorskip("pdoc")
    out = tmp_path_factory.mktemp("pages")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fnbp", "docs", "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return {path.relative_to(out).with_suffix("").as_posix(): path.read_text() for path in out.rglob("*.html")}


def shown(page, name):
    """The docstring of a name, as HTML."""
    found = re.search(rf'<section id="{name}">.*?<div class="docstring">(.*?)</div>\n', page, re.S)
    assert found, name
    return found[1]


def plain(text):
    """HTML as text."""
    return html.unescape(re.sub(r"<[^>]+>", "", text))


def test_every_public_name_has_a_place_and_a_line_on_the_front_page(pages):
    ids = {name for page in pages.values() for name in re.findall(r'<section id="(\w+)"', page)}
    front = set(re.findall(r"<code>(\w+)</code></a>", pages["fnbp"]))
    assert set(PUBLIC) - {"version"} <= ids & front


def test_every_link_of_the_front_page_has_its_target(pages):
    for page, name in re.findall(r'href="(fnbp/[\w/]+)\.html#(\w+)"', pages["fnbp"]):
        assert f'<section id="{name}">' in pages[page], name


def test_modules_without_all_are_not_shown(pages):
    assert "fnbp/layers/dense" in pages
    assert not {"fnbp/arrays/checks", "fnbp/layers/windows", "fnbp/comparison/alone", "fnbp/rendering/pages"} & set(
        pages
    )


def test_formulas_stay_as_they_are_written(pages):
    found = [getattr(fnbp, name) for name in PUBLIC if inspect.isfunction(getattr(fnbp, name))]
    for function in found:
        page = function.__module__.replace(".", "/")
        if not page.startswith("fnbp/"):
            continue
        text = shown(pages[page], function.__name__)
        formatted = "\n".join(plain(block) for block in re.findall(r"<pre>(.*?)</pre>", text, re.S)).splitlines()
        for line in inspect.getdoc(function).splitlines():
            if line.startswith("    ") and not line.startswith(" " * 8):
                assert line.removeprefix("    ").rstrip() in formatted, (function, line)


def test_sections_are_definitions_and_nothing_is_emphasised(pages):
    text = shown(pages["fnbp/layers/dense"], "dense")
    names = re.findall(r"<dt>(\w+)</dt>", text)
    assert names[0] == "Shapes" and names[-1] == "Raises"
    assert "x (..., n_in); z (..., n_out)" in plain(text)
    for name, page in pages.items():
        assert not re.search(r"<em>|<strong>", page), name


def test_a_docstring_as_markdown():
    text = rendering_pages.to_markdown(
        """A first line: with a colon, a *star and a `b*c`.

            y = x^T      dx = dy

        x      an array, of
               two lines
        count  a number

        Shapes: x (*s), a <b> and `c`;
                more.
        Raises: ValueError.
        """
    )
    assert text.splitlines() == [
        r"A first line: with a colon, a \*star and a `b*c`.",
        "",
        "    y = x^T      dx = dy",
        "",
        "    x      an array, of",
        "           two lines",
        "    count  a number",
        "",
        "<dl>",
        "<dt>Shapes</dt>",
        "<dd>x (*s), a &lt;b&gt; and <code>c</code>; more.</dd>",
        "<dt>Raises</dt>",
        "<dd>ValueError.</dd>",
        "</dl>",
    ]


def test_without_pdoc_it_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pdoc", None)
    assert main(["docs"]) == 2
    assert "pip install 'fnbp[docs]'" in " ".join(capsys.readouterr().err.split())


def test_without_a_folder_the_pages_are_opened(monkeypatch, tmp_path, capsys):
    opened = []
    monkeypatch.setattr(rendering_pages, "build", lambda out: tmp_path / "fnbp.html")
    monkeypatch.setattr(webbrowser, "open", opened.append)
    assert main(["docs"]) == 0
    assert opened[0].startswith("file:///") and opened[0].endswith("/fnbp.html")
    assert "saved" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_an_error_in_a_sentence(tmp_path, capsys):
    pytest.importorskip("pdoc")
    (tmp_path / "file").write_text("")
    assert main(["docs", "--out", str(tmp_path / "file" / "below")]) == 2
    assert "the pages cannot be written" in capsys.readouterr().err
