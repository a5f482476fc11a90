"""What lies around the package: workflows, forms, citation, changelog, what an index shows of it."""

import importlib.util
import re

import pytest
import yaml
from pages import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
PINNED = re.compile(r"[\w-]+/[\w.-]+@(v\d+|release/v\d+)")
SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}  # keepachangelog.com


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs(path):
    return read(path)["jobs"]


def project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def metadata():
    """The module .ci/metadata.py."""
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("metadata_hook", ROOT / ".ci" / "metadata.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_bounded_and_its_actions_pinned(path):
    flow = read(path)
    assert flow["name"] and flow[True]  # YAML 1.1 reads "on" so
    assert flow["permissions"] == {"contents": "read"}  # a job says what it needs beyond
    for name, job in flow["jobs"].items():
        assert job["timeout-minutes"] <= 120, name
        assert job.get("needs", name) in flow["jobs"]
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(PINNED.fullmatch(action) for action in used), used
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_files_that_exist(path):
    text = "\n".join(step.get("run", "") for job in jobs(path).values() for step in job["steps"])
    named = re.findall(r"(?<![\w/.])(?:\.ci|docs|tests|examples)/[\w./-]+", text)
    assert not [name for name in named if not (ROOT / name).exists()]
    files = re.findall(r"[\w.]+\.(?:toml|cff|md)\b", text)
    assert not [name for name in files if not (ROOT / name).exists()]


def test_the_tests_run_as_here():
    (job,) = jobs(GITHUB / "workflows" / "ci.yml").values()
    words = [row["versions"] for row in job["strategy"]["matrix"]["include"]]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(f"    {word}) {word} ;;" in script for word in words)
    assert job["steps"][-1]["run"] == "bash .ci/run ${{ matrix.versions }}"


def test_only_the_job_that_publishes_may_act_for_the_repository():
    for path in WORKFLOWS:
        held = {name: job["permissions"] for name, job in jobs(path).items() if "permissions" in job}
        assert held == {
            "docs": {"publish": {"contents": "write"}},
            "release": {"publish": {"id-token": "write"}, "tag": {"contents": "write"}},
        }.get(path.stem, {})


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_can_be_filled_in(path):
    form = read(path)
    assert form["name"] and form["description"]
    names = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert names and len(names) == len({*names})
    assert all(part["type"] in ("markdown", "textarea", "input", "dropdown") for part in form["body"])
    assert all(part["attributes"].get("label") for part in form["body"] if part["type"] != "markdown")


def test_the_citation_is_of_this_version():
    cited = read(ROOT / "CITATION.cff")
    assert cited["cff-version"] == "1.2.0" and cited["authors"] and cited["message"] and cited["title"]
    assert cited["license"] == project()["license"]
    assert cited["version"] == project()["version"]


def test_the_changelog_has_the_form_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions[1:])
    for part in re.split(r"^## .+$", text, flags=re.MULTILINE)[1:]:
        sections = re.findall(r"^### (.+)$", part, re.MULTILINE)
        assert {*sections} <= SECTIONS and len(sections) == len({*sections})


def test_an_index_shows_links_that_hold(monkeypatch):
    hook = metadata().Addresses(str(ROOT), {})
    for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY"):
        monkeypatch.delenv(name, raising=False)
    table = {"version": "1.2.3"}
    hook.update(table)
    assert table["urls"] == {}
    assert table["readme"]["text"] == (ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://host.example")
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/lora")
    hook.update(table)
    assert table["urls"]["Source"] == "https://host.example/someone/lora"
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", table["readme"]["text"]))
    assert links and all("://" in link for link in links)
    own = [link for link in links if link.startswith("https://host.example/")]
    paths = [re.sub(r"https://host\.example/someone/lora/(blob|raw)/v1\.2\.3/", "", link) for link in own]
    assert own and all((ROOT / path.partition("#")[0]).exists() for path in paths)


def test_a_picture_that_is_a_link_keeps_both():
    absolute = metadata().absolute
    assert absolute("[![p](a/b.png)](c.md) [d](https://e.org) [f](#g)", "https://h", "v1") == (
        "[![p](https://h/raw/v1/a/b.png)](https://h/blob/v1/c.md) [d](https://e.org) [f](#g)"
    )
