"""`finetune train`: bad photos, names, and runs that are resumed."""

import os
import shlex

from command_line import run
from photo_files import write_photo


def test_bad_photos_come_with_the_command_that_skips_them(tmp_path):
    photos = tmp_path / "my photos"
    for i in range(30):
        write_photo(photos / ("a" if i % 2 else "b") / f"{i}.png", str(i))
    (photos / "a" / "bad.jpg").write_bytes(b"")
    (tmp_path / "c.yaml").write_text("data: {train: my photos}\nmodel: {backbone: efficientnet_lite0}\n")
    assert run("check", f"data.train={photos}", f"runtime.cache_dir={tmp_path}").exit_code == 3
    for command in ("train", "check"):
        answer = run(command, tmp_path / "c.yaml", "runtime.cache_dir=" + str(tmp_path), "data.val_split=0.3")
        assert answer.exit_code == 3
        assert f"{photos}/a/bad.jpg: the file is empty" in answer.stderr
        words = f"finetune train {tmp_path}/c.yaml runtime.cache_dir={tmp_path} data.val_split=0.3"
        assert f"leave them out: {words} data.on_bad_image=skip\n" in answer.stderr
    assert not (tmp_path / "runs").exists()
    again = run("check", *shlex.split(words)[2:], "data.on_bad_image=skip")
    assert again.exit_code == 0


def test_a_name_that_leads_elsewhere_is_refused(tmp_path):
    answer = run("train", f"data.train={tmp_path}", "--name", "../elsewhere")
    assert answer.exit_code == 2
    assert "output.name" in answer.stderr


def test_resume_finds_the_newest_in_a_named_folder(tmp_path):
    for i, name in enumerate(("new", "old", "done")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("data: {train: x}")
        (tmp_path / name / "split.csv").write_text("")
        os.utime(tmp_path / name / "split.csv", (9 - i, 9 - i))
    (tmp_path / "done" / "run.json").write_text("{}")
    assert f"resuming {tmp_path / 'new'}\n" in run("train", "--resume", tmp_path).stderr
    assert f"resuming {tmp_path / 'old'}\n" in run("train", "--resume", tmp_path / "old").stderr


def test_resume_refuses_other_settings(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {train: x}")
    answer = run("train", "--resume", tmp_path, "training.learning_rate=1")
    assert answer.exit_code == 2
    assert "cannot change" in answer.stderr


def test_resume_does_not_take_the_folder_of_a_project_for_a_run(tmp_path):
    """Such a folder has a config.yaml, too; it was once called an unfinished run to be removed."""
    (tmp_path / "config.yaml").write_text("data: {train: x}")
    answer = run("train", "--resume", tmp_path)
    assert answer.exit_code == 1
    assert f"there is no unfinished run in {tmp_path}\n" in answer.stderr
    assert "remove" not in answer.stderr
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text("{}")
    assert f"in {tmp_path}; all runs there are finished\n" in run("train", "--resume", tmp_path).stderr
