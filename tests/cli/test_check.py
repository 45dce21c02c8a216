"""`finetune check` and `finetune init` on the same photos, with `sample` and `preview`."""

from command_line import run
from photo_files import write_photo
from PIL import Image

from finetune_cli.config.load import load_config


def test_sample_init_check_preview(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("sample", "photos", "--photos", 6).exit_code == 0
    assert run("init", "photos").exit_code == 0
    assert run("init", "photos").exit_code == 2  # the config exists
    (tmp_path / "photos" / "notes.txt").write_text("")
    assert "2 .txt files" in run("init", "photos", "--output", "other.yaml").stderr
    answer = run("check", "config.yaml", f"runtime.cache_dir={tmp_path / 'cache'}")
    assert answer.exit_code == 0, answer.output
    assert "every photo was decoded" in answer.stdout
    answer = run("preview", "config.yaml", f"runtime.cache_dir={tmp_path / 'cache'}", "--photos", 2)
    assert answer.exit_code == 0, answer.output
    assert (tmp_path / "preview.png").is_file()
    assert "differently" not in answer.stdout  # with folds, nothing is split
    split = ("config.yaml", "data.folds=null", f"runtime.cache_dir={tmp_path / 'cache'}")
    for command in ("check", "preview"):
        line = "train may split the photos a little differently: it looks for near-duplicates"
        assert line in run(command, *split).stdout
        assert "differently" not in run(command, *split, "data.near_duplicates=ignore").stdout


def test_init_and_check_propose_groups(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for label in ("cat", "dog"):
        for i in range(40):
            write_photo(tmp_path / "photos" / label / f"p{i // 4}-{i % 4}.png")
    answer = run("check", "data.train=photos", "model.backbone=efficientnet_lite0")
    assert answer.exit_code == 0, answer.output
    assert "warning: photos such as " in answer.stderr
    assert "'data.group_regex=(?:^|/)(p[0-9]+)'" in answer.stderr
    answer = run("init", "photos")
    assert "config.yaml sets data.group_regex" in answer.stderr
    text = (tmp_path / "config.yaml").read_text()
    assert "A guess: photos such as cat/p" in text
    assert load_config(tmp_path / "config.yaml").data.group_regex == "(?:^|/)(p[0-9]+)"
    answer = run("check", "config.yaml")
    assert answer.exit_code == 0, answer.output
    assert "warning" not in answer.stderr


def test_check_and_init_warn_of_photos_of_one_moment_in_both_splits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(40):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9003] = f"2017:12:12 11:{i // 4:02}:{i % 4:02}"
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path, exif=exif)
    check = ["check", "data.train=photos", "model.backbone=efficientnet_lite0"]
    for arguments, sides in ((check, "both train and val"), (["init", "photos"], "several folds")):
        answer = run(*arguments)
        assert answer.exit_code == 0, answer.output
        assert "warning: 40 of 40 photos with a recording time (Exif)" in answer.stderr
        assert f"are in {sides}; if they show the same thing, name the groups" in answer.stderr
    assert load_config(tmp_path / "config.yaml").data.group_regex is None
