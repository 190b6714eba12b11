from pathlib import Path

from cdistill.storage.own_words import is_near, is_own, objection, write_own


def test_what_was_written_here_may_say_all(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))
    path = tmp_path / "run" / "r.toml"
    write_own(path, "mine")
    assert is_own(path.read_bytes())
    assert objection(path, b"mine", {"--features": "a:b", "--data": "/etc/x"}) is None
    assert objection(path, b"theirs", {"--features": None, "--data": str(path.parent / "x.npz")}) is None
    assert "r.toml: names code, and was not written here" in str(objection(path, b"theirs", {"--features": "a:b"}))
    assert "--data '" not in str(objection(path, b"theirs", {"--data": "/etc/\x1b[31m"}))
    assert "/etc/\\x1b[31m" in str(objection(path, b"theirs", {"--data": "/etc/\x1b[31m"}))


def test_an_asset_folder_that_cannot_be_written_is_no_hindrance(tmp_path, monkeypatch):
    (tmp_path / "assets").write_text("a file")
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))
    write_own(tmp_path / "r.toml", "mine")
    assert not is_own(b"mine")


def test_near_is_what_lies_in_the_folder_links_and_home_followed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "away").symlink_to("/etc")
    record = Path("r.json")
    assert is_near(record, "x/y.npz")
    assert not any(is_near(record, named) for named in ("~/x.npz", "../x.npz", "/etc/x", "away/x", "x/../../y"))
