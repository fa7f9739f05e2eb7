import sys

import pytest

from t2i_spo_plugin import errors


def test_every_error_is_a_spo_error():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) >= 9
    assert all(issubclass(kind, errors.SPOError) for kind in kinds)
    assert issubclass(errors.AdapterError, ValueError)
    assert issubclass(errors.PipelineError, TypeError)


def test_a_missing_extra_is_named_with_its_cure():
    with pytest.raises(errors.MissingExtraError, match=r"pip install 't2i_spo_plugin\[nudenet\]'"):
        errors.require_extra("no_such_module_at_all.part", "nudenet")


def test_an_installed_module_is_returned():
    assert errors.require_extra("json", "eval") is sys.modules["json"]


def test_an_import_error_inside_an_installed_module_is_not_blamed_on_the_extra(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError) as caught:
        errors.require_extra("half_installed", "eval")
    assert not isinstance(caught.value, errors.MissingExtraError)
