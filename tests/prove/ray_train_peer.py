"""The tiny job under plain Ray Train v2, for comparison: four workers, one killed, all restarted.

Runs in an environment of its own that has what ray.train needs (environments.ray_train). Prints one
JSON line: seconds from the kill to the next finished step of anybody, the step of the kill, the one
resumed at, and how many processes were workers.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WORKERS, STEPS, KILL_AT, SAVE_EVERY = 4, 400, 25, 10


def loop(config: dict[str, Any]) -> None:
    """A worker: steps of the tiny job, a checkpoint now and then, a line in a log for each."""
    import torch
    import torch.distributed as dist
    from ray import train as ray_train

    from tests.train.elastic.tiny import Whole
    from train.state import TrainState
    from train.world import GlooWorld

    torch.set_num_threads(1)
    trainee = Whole(STEPS * 12, config["pause_s"])
    group = dist.group.WORLD
    assert group is not None
    world = GlooWorld(group)
    found = ray_train.get_checkpoint()
    if found:
        with found.as_directory() as folder:
            trainee.load(TrainState(**torch.load(Path(folder) / "state.pt", weights_only=False)))
    while trainee.step_number < STEPS:
        end = trainee.step(world)
        with (Path(config["log"]) / f"{os.getpid()}.log").open("a") as file:
            file.write(f"{time.time()} {world.rank} {end.step}\n")
        if end.step % SAVE_EVERY == 0:
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = None
                if world.rank == 0:
                    torch.save(vars(trainee.state()), Path(folder) / "state.pt")
                    checkpoint = ray_train.Checkpoint.from_directory(folder)
                ray_train.report({"loss": end.loss}, checkpoint=checkpoint)
        if (Path(config["log"]) / "stop").exists():
            os._exit(0)


def lines(log: Path) -> list[tuple[float, int, int, int]]:
    """All steps so far: time, rank, step, process."""
    found = []
    for path in log.glob("*.log"):
        for line in path.read_text().splitlines():
            at, rank, step = line.split()
            found.append((float(at), int(rank), int(step), int(path.stem)))
    return sorted(found)


def watch(log: Path) -> None:
    """Kills rank 1 after step KILL_AT, waits for the next steps, prints, ends everything."""
    while not any(step >= KILL_AT for _, _, step, _ in lines(log)):
        time.sleep(0.02)
    victim = next(pid for _, rank, _, pid in lines(log) if rank == 1)
    before = {pid for *_, pid in lines(log)}
    killed_s = time.time()
    os.kill(victim, signal.SIGKILL)
    reached = max(step for *_, step, _ in lines(log))
    while not (after := [line for line in lines(log) if line[3] not in before]):
        time.sleep(0.02)
    time.sleep(1.0)
    answer = {
        "resumed_s": after[0][0] - killed_s,
        "killed_at": reached,
        "resumed_at": after[0][2],
        "kept": len(before & {line[3] for line in lines(log) if line[0] > after[0][0]}),
    }
    print("PEER", json.dumps(answer), flush=True)
    (log / "stop").touch()


def main(folder: Path, pause_s: float) -> None:
    """One run."""
    import ray
    from ray import train as ray_train
    from ray.train.torch import TorchConfig, TorchTrainer

    log = folder / "log"
    log.mkdir(parents=True)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        "local",
        num_cpus=WORKERS + 1,
        include_dashboard=False,
        object_store_memory=160 << 20,
        log_to_driver=False,
        logging_level=40,
        _temp_dir=str(folder / "r"),
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
    )
    threading.Thread(target=watch, args=(log,), daemon=True).start()
    trainer = TorchTrainer(
        loop,
        train_loop_config={"log": str(log), "pause_s": pause_s},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray_train.ScalingConfig(num_workers=WORKERS),
        run_config=ray_train.RunConfig(
            storage_path=str(folder / "storage"),
            name="tiny",
            failure_config=ray_train.FailureConfig(max_failures=1),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # it is ended by us, once measured
        print(f"ended: {type(error).__name__}", file=sys.stderr)
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
