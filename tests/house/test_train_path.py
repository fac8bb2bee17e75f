"""The way of a step in train/README.md is the way that a real run takes."""

import re
import sys
from pathlib import Path

from tests.train import tiny
from train.checkpoints import open_checkpoints
from train.commands import begin
from train.folder import RunFolder
from train.run import Run
from train.view import console_of_nobody
from train.world import LocalWorld

README = Path(__file__).parents[2] / "train" / "README.md"


class Tracer:
    """Notes modules of train in the order of their first call."""

    def __init__(self):
        self.entered: list[str] = []

    def __call__(self, frame, event, _argument):
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith("train.") and name not in self.entered:
            self.entered.append(name)


def traced(path: Path) -> list[str]:
    texts = tiny.write_texts(path / "texts")
    job = tiny.job(
        name="t", folder=path, data={"sources": (str(texts),)}, run={"tokens": 16 * 12 * 2}
    )
    folder = RunFolder(job.path)
    begin(job, folder, console_of_nobody())
    tracer = Tracer()
    sys.setprofile(tracer)
    try:
        run = Run(job, folder, open_checkpoints(job, folder.checkpoints))
        run.resume()
        run.run(LocalWorld())
    finally:
        sys.setprofile(None)
    return tracer.entered


def test_the_way_of_a_step_is_the_one_in_the_readme(tmp_path: Path):
    listed = re.findall(r"^\d+\. `(train[\w.]*)`", README.read_text(), re.MULTILINE)
    assert traced(tmp_path) == listed


def test_every_listed_module_is_described():
    lines = re.findall(r"^\d+\. `train[\w.]*`(.*)$", README.read_text(), re.MULTILINE)
    assert lines and all(line.startswith(": ") and len(line) > 10 for line in lines)
