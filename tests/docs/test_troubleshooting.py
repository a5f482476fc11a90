"""docs/troubleshooting.md has every message of ours."""

import pytest
from messages import ERRORS, Message, Reader, Source, tidy
from remedies import taken_apart
from torch import nn
from troubleshooting import GROUPS, PAGE, WITHIN, group_of, messages_of, rows, written

import lora_lightning as ll


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader.of_package()


def test_the_page_is_up_to_date(reader):
    assert PAGE.read_text(encoding="utf-8") == written(reader), (
        "python tests/docs/troubleshooting.py writes it anew"
    )


def test_every_message_says_what_is_wrong_and_what_to_do(reader):
    """Or it is a reason that is named within a message that does (WITHIN)."""
    found = list(rows(messages_of(reader)))
    assert [cause for _, cause, remedy in found if not remedy] == []
    assert [remedy for _, cause, remedy in found if not cause.rstrip(":;")] == []
    assert {group for group, _, _ in found} <= set(GROUPS)


def test_messages_that_name_reasons_are_there(reader):
    texts = [m.text for m in messages_of(reader)]
    assert [w for w in WITHIN.values() if not any(w in t and taken_apart(t)[1] for t in texts)] == []
    places = [m.module for m in messages_of(reader)]
    assert [w for w in WITHIN if w not in places and not any(t.startswith(w) for t in texts)] == []


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        ("rank=<rank>: give at least 1.", "rank=<rank>:", "give at least 1."),
        (
            "it is there. Give another name: this is taken.",
            "it is there.",
            "Give another name: this is taken.",
        ),
        ("no such option. Did you mean …? Options: ….", "no such option.", "Did you mean …? Options: …."),
        ("no such option. Did you mean …?", "no such option. Did you mean …?", ""),
        ("<n>: foreign. If it is yours, give <n>", "<n>: foreign.", "If it is yours, give <n>"),
        (
            "resume=<x>: is gone; it holds <name> to train",
            "resume=<x>: is gone; it holds <name> to train",
            "",
        ),
        ("<x>: it needs pyarrow: pip install pyarrow", "<x>: it needs pyarrow:", "pip install pyarrow"),
    ],
)
def test_cause_and_remedy(text, cause, remedy):
    assert taken_apart(text) == (cause, remedy)


def test_what_is_raised_is_read(reader):
    """But for what hands on the message of another error, and a few lines that are made of data alone."""
    raised = list(reader.raised())
    unread = [(s.name, n.lineno) for s, n, texts in raised if not any(tidy(t.text) for t in texts)]
    assert len(raised) > 400
    assert len(unread) < 0.1 * len(raised), unread


def test_messages_that_are_met_are_on_the_page():
    page = PAGE.read_text(encoding="utf-8")
    for call, words in (
        (lambda: ll.LoRAConfig(rank="auto", budget=3, init="lora_one", use_dora=True), "their directions"),
        (lambda: ll.LoRAConfig(restarts=1, dropout=0.1), "would be dropped, too"),
        (lambda: ll.load_adapter(nn.Linear(2, 2), "nowhere"), "does not exist"),
        (lambda: ll.adapter_names(nn.Linear(2, 2)), "is not an adapted model"),
    ):
        with pytest.raises(ll.UserError, match=words):
            call()
        assert words in page, words


def test_each_form_of_a_text_is_read():
    source = """
GIVE = "Give a folder."

def read(path, faults):
    problems = ["the first thing is wrong"] if path else []
    problems += [f"{path}: and also here" for fault in faults]
    problems.append(_fault(path))
    if problems:
        raise UserError(f"{path} cannot be read: {path.name}. {GIVE}" + "\\n".join(problems))

def _fault(path):
    return f"{path!r} is too " + ("long for it" if path else "short for it")
"""
    reader = Reader([Source("made", source)])
    ((_, _, texts),) = reader.raised()
    assert {tidy(t.text) for t in texts} >= {
        "<path> cannot be read: <name>. Give a folder.…",
        "the first thing is wrong",
        "<path>: and also here",
        "<path> is too long for it",
        "<path> is too short for it",
    }
    assert all(isinstance(t, Message) for t in texts)


def test_remedies_are_followed_to_their_texts():
    source = """
def read(path, remedy="Give a file."):
    raise UserError(f"{path} cannot be read. {remedy}")

def one(path):
    read(path)
    read(path, "Delete it.")

def other(path):
    raise UserError(f"{path} is not there. {_remedy(path)}")

def _remedy(path):
    return "Copy it." if path else "Make it."
"""
    reader = Reader([Source("made", source)])
    texts = {tidy(t.text) for _, _, found in reader.raised() for t in found}
    assert texts == {
        "<path> cannot be read. Give a file. Or: Delete it.",
        "<path> is not there. Copy it.",
        "<path> is not there. Make it.",
    }


def test_every_room_has_a_group():
    assert {"UserError", "ConfigError"} <= set(ERRORS)
    for module in ("app.check", "data.audio", "files.pair", "models.timm", "trainer.callback", "tasks.ctc"):
        assert group_of(module) in GROUPS
    assert group_of("elsewhere.x") == "Other"
