"""A process that works in a run folder, for the tests to send signals to: `run_worker.py FOLDER SECONDS_PER_STEP`.

It says `step N` on stdout before each of 1000 steps, and behaves like a recipe otherwise.
"""

import sys
import time

from preftune.engine.run import Run


def main(folder: str, seconds: float) -> None:
    with Run.open(folder, stage="dpo", config={"lr": 1e-6}, resume=True) as run:
        run.begin(1000, 0)
        for step in range(1, 1001):
            print("step", step, flush=True)
            time.sleep(seconds)
            run.after_step(step, {"loss": 1 / step})
            if run.stop_signal is not None:
                break
        run.finish({"steps": step})


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
