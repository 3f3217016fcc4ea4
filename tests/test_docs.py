"""The front of the house: links lead somewhere, commands exist, configurations load, generated parts are fresh."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tiny import tiny_model
from tiny_text import causal_tokenizer
from veiltune.cli import app
from veiltune.config import Section, TrainConfig, TuneConfig, VendorConfig, load_config, parse_config
from veiltune.config.guard import GuardConfig
from veiltune.guard.questions import NextTokenQuestion, parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("docs/*.md"))
CONFIGS = sorted(ROOT.glob("configs/*.toml"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEREDOC = re.compile(r"<<'END'\n(.*?)^END$", re.MULTILINE | re.DOTALL)
INLINE_COMMAND = re.compile(r"`(veiltune [^`]+)`")
PLACEHOLDERS = {"NAME": "acme", "HOST": "localhost", "CONFIG": "tune.toml"}
OF_ONE_MACHINE = re.compile(r"(?<![\w.:/])(/(?:home|root|tmp|work|Users|mnt|opt|var)/|[A-Z]:\\)")


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_resolve(page: Path) -> None:
    links = [link for link in LINK.findall(without_code(page)) if not link.startswith(("https://", "mailto:"))]
    assert [link for link in links if not resolves(page, link)] == []


def test_the_link_check_can_fail() -> None:
    assert not resolves(PAGES[0], "docs/none.md")
    assert not resolves(PAGES[0], "docs/design.md#none")
    assert resolves(PAGES[0], "docs/design.md#families")


def resolves(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


def anchors(page: Path) -> set[str]:
    """The identifiers that a forge gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_code(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands_on(page: Path) -> Iterator[str]:
    """Every command line of a page: in its shell blocks, heredocs taken out, and in its running text."""
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "sh":
            yield from (line for line in HEREDOC.sub("", code).splitlines() if line.strip())
    for command in INLINE_COMMAND.findall(without_code(page)):
        if " " in command and not command.endswith(("]", "}")):
            yield command


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_exist(page: Path) -> None:
    for line in commands_on(page):
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)]
        for command in split_at_operators(words):
            check_command(command, line)


def split_at_operators(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    for word in [*words, "&&"]:
        if word not in ("&&", "|", "&"):
            command.append(word)
        elif command:
            yield command
            command = []


def check_command(words: list[str], line: str) -> None:
    match words:
        case ["veiltune", *arguments]:
            parse_command(arguments)
        case ["make", *verbs]:
            assert set(verbs) <= make_verbs(), line
        case ["python", script, *_] if script.endswith(".py"):
            assert (ROOT / script).is_file(), line
        case ["pytest", *files]:
            assert all((ROOT / file).is_file() for file in files), line
        case ["python", "-c", code]:
            compile(code, line, "exec")
        case ["torchrun", "--standalone", "--nproc-per-node", _, "-m", "veiltune", *arguments]:
            parse_command(arguments)
        case ["curl", "-H", "Authorization: Bearer $KEY", "--json", body, address]:
            assert address == f"http://{GuardConfig().address}/v1/next-token"
            assert parse(NextTokenQuestion, body.encode()).prompt
        case ["pip", "install", *_] | ["cat", *_]:
            pass
        case _:
            raise AssertionError(f"no rule how to check the command {line!r}; add one")


def parse_command(arguments: list[str]) -> None:
    """Has Typer parse a command line without running it; `veiltune vendor init` may stand alone as a name."""
    command: Any = get_command(app)
    context: Any = command.make_context("veiltune", ["--help"], resilient_parsing=True)
    while hasattr(command, "get_command") and arguments:
        name, *arguments = arguments
        command = command.get_command(context, name)
        assert command is not None, f"there is no command {name!r}"
    if arguments:
        command.make_context(command.name, list(arguments))


def make_verbs() -> set[str]:
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("arguments", [["serve"], ["tune", "a.toml", "--epochs", "3"], ["vendor", "tenant", "ad", "x"]])
def test_the_command_check_can_fail(arguments: list[str]) -> None:
    with pytest.raises(Exception, match=r"no command|No such option"):
        parse_command(arguments)


def test_the_readme_has_a_session() -> None:
    """The four things that a newcomer pastes are among the commands that are checked."""
    text = "\n".join(commands_on(ROOT / "README.md"))
    for command in ("make demo", "make test", "veiltune vendor serve", "veiltune tune", "veiltune predict"):
        assert command in text


@pytest.mark.parametrize("config", CONFIGS, ids=page_id)
def test_configurations_load(config: Path) -> None:
    kinds: dict[str, type[Section]] = {"vendor": VendorConfig, "tune": TuneConfig, "train": TrainConfig}
    load_config(kinds[config.stem.partition("-")[0]], config)


def test_there_are_configurations() -> None:
    assert {"vendor", "tune-sap-k2", "tune-ushape", "tune-plain-sap", "train-sst2", "train-e2e"} <= {
        config.stem for config in CONFIGS
    }


def test_configurations_are_what_their_names_say() -> None:
    by_name = {c.stem: load_config(TuneConfig, c) for c in CONFIGS if c.stem.startswith("tune-")}
    protected, u_shape, plain = by_name["tune-sap-k2"], by_name["tune-ushape"], by_name["tune-plain-sap"]
    assert (protected.split.cut_layer, protected.split.bottom, protected.privacy.mechanism) == (2, "frozen", "d_chi")
    assert protected.privacy.labels == u_shape.privacy.labels == "randomized_response"
    assert u_shape.split.head == "customer"
    assert (plain.split.cut_layer, plain.privacy.cti, plain.privacy.labels) == (0, "budget", "disclosed")
    assert all(config.noise_seed is None for config in by_name.values())
    trained = {c.stem: load_config(TrainConfig, c) for c in CONFIGS if c.stem.startswith("train-")}
    assert [trained[name].model.task for name in ("train-sst2", "train-e2e")] == ["classification", "generation"]
    assert all(config.privacy.epsilon == 8 and config.noise_seed is None for config in trained.values())


def test_the_configurations_in_the_readme_load() -> None:
    import tomllib

    split, private, leak, guard = HEREDOC.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    parse_config(TuneConfig, tomllib.loads(split))
    assert parse_config(TrainConfig, tomllib.loads(private)).privacy.epsilon == 8
    assert parse_config(TrainConfig, tomllib.loads(leak)).data.person_column == "person"
    assert parse_config(TrainConfig, tomllib.loads('defences.preset = "dp"\n' + leak)).defences.preset == "dp"
    assert parse_config(GuardConfig, tomllib.loads(guard)).limits.budget == 100_000


def test_the_loop_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model instead of SmolLM2, and with smaller batches."""
    monkeypatch.chdir(tmp_path)  # it writes a model
    (block,) = PYTHON.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    tiny_model("gpt2", "causal").save_pretrained(tmp_path)
    causal_tokenizer().save_pretrained(tmp_path)
    for here, there in (
        ('"smollm2"', repr(str(tmp_path))),
        ("size=256", "size=8"),
        ("max_length=128", "max_length=40"),
    ):
        assert here in block
        block = block.replace(here, there)
    names: dict[str, Any] = {"prompts": [f"what is {i}" for i in range(24)], "targets": ["it is good"] * 24}
    exec(block, names)
    assert len(names["batches"]) == 9  # three passes at a third of the table each
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_generated_parts_are_fresh(page: Path) -> None:
    command = [sys.executable, "-m", "cogapp", "-I", str(ROOT / "docs"), "--check", "--diff", page.name]
    done = subprocess.run(command, cwd=page.parent, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, f"run `make docs`\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("name", ["cli.md", "configuration.md"])
def test_the_freshness_check_can_fail(name: str, tmp_path: Path) -> None:
    stale = (ROOT / "docs" / name).read_text(encoding="utf-8").replace("Override", "Overwrite").replace("`adapter`", "")
    (tmp_path / name).write_text(stale, encoding="utf-8")
    command = [sys.executable, "-m", "cogapp", "-I", str(ROOT / "docs"), "--check", name]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS], ids=page_id)
def test_no_path_of_one_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert OF_ONE_MACHINE.findall(text) == []
    assert str(ROOT) not in text


def test_the_path_check_can_fail() -> None:
    assert OF_ONE_MACHINE.findall("see /home/ann/x or (/tmp/y) or C:\\z") == ["/home/", "/tmp/", "C:\\"]
    assert OF_ONE_MACHINE.findall("https://example.org/home/ann and docs/work/log.md") == []


def test_the_picture_is_well_formed_and_light() -> None:
    """It has a background of its own, so that it can be read on a dark page, and needs nothing from outside."""
    picture = ROOT / "docs" / "who-holds-what.svg"
    root = ElementTree.parse(picture).getroot()
    namespace = "{http://www.w3.org/2000/svg}"
    background = root.find(f"{namespace}rect")
    assert background is not None and background.get("fill") == "#ffffff"
    assert root.find(f"{namespace}title") is not None
    assert root.findall(f".//{namespace}image") == []


def test_the_demo_stands_between_its_markers() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (demo,) = re.findall(r"<!-- demo -->\n```\n(.*?)^```$.*?<!-- /demo -->", text, re.DOTALL | re.MULTILINE)
    assert "utility" in demo and "empirical privacy" in demo
