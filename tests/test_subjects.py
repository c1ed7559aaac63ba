"""What a user names on a command line is found, or the message says what is wrong."""

from pathlib import Path

import pytest
import torch

from flatstep.subjects import Subject, option, subject


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("torch.optim:Adam", "adam"),
        ("torch.optim:AdamW", "adamw"),
        ("flatstep:RMSprop", "rmsprop"),
        ("torch.optim.sgd:SGD", "sgd"),
    ],
)
def test_the_rule_follows_from_the_class_name(path: str, rule: str):
    assert subject(path).rule == rule


def test_options_of_a_call_come_before_those_of_the_subject():
    found = subject("torch.optim:AdamW", ["lr=0.5", "weight_decay=0.25"])
    optimizer = found([torch.nn.Parameter(torch.zeros(1))], lr=0.125)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.125, 0.25)
    assert found.label == "torch.optim.AdamW, lr=0.5, weight_decay=0.25"
    assert found.accepts("fused")
    assert not found.accepts("momentum")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lr=1e-3", 1e-3),
        ("betas=(0.9, 0.95)", (0.9, 0.95)),
        ("fused=True", True),
        ("state_dtype=torch.float32", torch.float32),
        ("master=split", "split"),
    ],
)
def test_options_are_values_in_pythons_notation(text: str, value: object):
    assert option(text) == (text.partition("=")[0], value)


@pytest.mark.parametrize("text", ["lr", "lr=", "=1", "a b=1"])
def test_an_option_that_cannot_be_read_says_its_form(text: str):
    with pytest.raises(ValueError, match="is not of the form name=value"):
        option(text)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("torch.optim", "not of the form package.module:callable"),
        ("no_such_module:Adam", "no_such_module:Adam cannot be found: ModuleNotFoundError"),
        ("torch.optim:Nothing", "torch.optim:Nothing cannot be found: AttributeError"),
        ("torch:optim", "is a module, not an optimizer class"),
        ("torch.optim:LBFGS", "does not say which rule it follows; say it with --rule"),
    ],
)
def test_what_is_not_there_is_named(path: str, message: str):
    with pytest.raises(ValueError, match=message):
        subject(path)


def test_an_unknown_rule_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="no rule 'lion'; there are adamw, adam, rmsprop, sgd"):
        subject("torch.optim:Adam", rule="lion")


def test_the_working_directory_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine_alone.py").write_text("from torch.optim import SGD as MySGD\n")
    monkeypatch.chdir(tmp_path)
    assert subject("mine_alone:MySGD") == Subject("mine_alone:MySGD", "sgd")
