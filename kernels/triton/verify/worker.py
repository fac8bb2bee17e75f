"""Layer C, a process that compiles cases: one line asks, one line answers, both JSON.

Apart from the sweep, because a kernel may take minutes or take the compiler down, and because
Triton cannot compile where it interprets. Started by `aot.py`.
"""

import json
import os
import subprocess
import sys
import threading
from queue import Empty, Queue
from typing import Any

from kernels.triton.case import Case
from kernels.triton.targets import target
from kernels.triton.verify.compiled import compile_case, faults
from kernels.triton.verify.shipped import shipped

START_S = 120.0  # for imports, on a busy machine


class Worker:
    """Compiles cases in a process of its own, which is replaced when it takes too long or dies.

    As a context manager it ends the process.
    """

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._process: subprocess.Popen[str] | None = None
        self._answers: Queue[str] = Queue()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def compile(self, module: str, target_name: str, case: str) -> dict[str, Any]:
        """The fields of `Compiled` and "faults", or only "faults" if it did not compile."""
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([module, target_name, case]) + "\n")
            process.stdin.flush()
            line = self._answers.get(timeout=self.deadline_s)
        except Empty:
            self._end()
            return {"faults": [f"does not compile within {self.deadline_s:.0f} s"]}
        except BrokenPipeError:
            line = ""
        if not line:
            self._end()
            return {"faults": ["takes the compiler down"]}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kernels.triton.verify.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=env,
            )
            self._answers = Queue()
            threading.Thread(
                target=_forward, args=(self._process, self._answers), daemon=True
            ).start()
            if self._answers.get(timeout=START_S) != "ready\n":
                raise RuntimeError("the process that compiles kernels did not start.")
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _forward(process: subprocess.Popen[str], answers: Queue[str]) -> None:
    """Every line, and an empty one at the end."""
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put("")


def answer(module: str, target_name: str, name: str) -> dict[str, Any]:
    chosen = target(target_name)
    case = next(
        each for each in shipped(module, chosen) if isinstance(each, Case) and each.name == name
    )
    try:
        made = compile_case(case, chosen)
    except Exception as failed:  # whatever the compiler raises is an answer
        said = str(failed).strip().splitlines() or [""]
        return {"faults": [f"does not compile: {type(failed).__name__}: {said[-1]}"[:300]]}
    fields = {name: value for name, value in made._asdict().items() if name != "narrow"}
    return {**fields, "faults": faults(case, chosen, made)}


def main() -> None:
    """Only answers go to the pipe: what the compiler prints would be taken for one."""
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    print("ready", file=pipe, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), file=pipe, flush=True)


if __name__ == "__main__":
    main()
