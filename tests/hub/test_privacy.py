"""Texts that would give something away."""

import pytest
from support.publishing import TOKEN

from t2i_spo_plugin.hub.privacy import own_name, private_part, without_folders


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/somebody/models/sd15", "sd15"),
        ("/data/my models/sd15/", "sd15"),
        ("~/models/sd15", "sd15"),
        ("C:\\Users\\some body\\sd15", "sd15"),
        ("\\\\server\\share\\x\\sd15", "sd15"),
        ("file:///srv/models/sd15", "sd15"),
        ('["/srv/a/knives", "/srv/a/blood"]', '["knives", "blood"]'),
        ("from /srv/runs/a.pt, and/or 1/2", "from a.pt, and/or 1/2"),
        ("made in /home/somebody", "made in "),
    ],
)
def test_absolute_paths_are_seen_and_reduced_to_their_last_part(text, kept):
    assert private_part(text) == "an absolute path"
    assert without_folders(text) == kept and private_part(kept) == ""


def test_tokens_paths_and_names_are_private_and_hub_ids_are_not(monkeypatch):
    for text in ("user/repo", "https://huggingface.co/user/repo", "1/2 and/or 3", "lambda 1.0", "a: b"):
        assert without_folders(text) == text and private_part(text) == ""
    for token in (TOKEN, "sk-" + "a" * 24, "ghp_" + "a" * 30, "https://me:word@host/x", "AKIA" + "A" * 16):
        assert private_part(f"x {token} y") == "a token or password"
    monkeypatch.setattr("getpass.getuser", lambda: "marianne")
    assert own_name("by Marianne, for all") == "this account's name"
    assert own_name("by Marianne, for all", public=("marianne/adapter",)) == own_name("mariannes") == ""
