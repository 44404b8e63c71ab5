import pytest

from scatterfold.parallel.disk import write_whole


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(path, fail)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"
    write_whole(path, lambda temporary: temporary.write_text("after"))
    assert path.read_text() == "after"
