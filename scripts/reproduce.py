"""The paper's comparison, at the scale of this machine: every method, several seeds, one command.

  python scripts/reproduce.py                                  all of it, or what is left of it
  python scripts/reproduce.py --only ppo espo --seeds 1        a part
  python scripts/reproduce.py scripts/studies/mine.toml        a study of your own
  python scripts/reproduce.py --results-only                   tables and plots of what is done

Runs one training run after another, or several at a time by --jobs, and goes on where it was
interrupted. Writes into the study's output folder: results.json, results.md, the plots as PNG.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark.arguments import count
from espo_rl.record.json_files import write_json
from espo_rl.record.output import OutputError, check_own, json_with
from espo_rl.record.run_folder import RunFolderError
from study.design import Run, Study, StudyError, load_study
from study.plots import draw_all
from study.results import results_of
from study.runner import Stopped, check, run_study
from study.table import markdown

STUDIES = Path(__file__).parent / "studies"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", nargs="?", type=Path, default=STUDIES / "arithmetic.toml")
    parser.add_argument("--only", nargs="+", metavar="METHOD", default=[], help="these methods")
    parser.add_argument("--seeds", type=int, metavar="N", help="of each method")
    parser.add_argument(
        "--first-seed", type=int, metavar="S", help="tune on one set of seeds, report on another"
    )
    parser.add_argument("--output", type=Path, help="folder (default: the study's)")
    parser.add_argument(
        "--set",
        nargs="+",
        metavar="section.key=value",
        default=[],
        help="for every run; a method's own come after",
    )
    parser.add_argument(
        "--jobs",
        type=count,
        default=1,
        metavar="N",
        help="runs at a time, where there is room for them; their seconds are then no measurement",
    )
    parser.add_argument("--results-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    try:
        study = study_of(options)
        results = study.output / "results.json"
        check_own(results, "--output", "results of a study", json_with("runs", "methods"))
        failed: list[Run] = []
        if options.results_only:
            check(study)
        else:
            failed = run_study(study, options.jobs)
    except (OutputError, StudyError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt):
        print("reproduce: interrupted; the same command goes on", file=sys.stderr)
        return 130
    try:
        write(study)
    except (OSError, RunFolderError, StudyError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 1 if failed else 2
    return 1 if failed else 0


def study_of(options: argparse.Namespace) -> Study:
    """The file with the command line's changes. Raises StudyError."""
    changes = {"output": options.output, "first_seed": options.first_seed}
    study = load_study(options.study, **changes)
    if options.only:
        study = study.only(options.only)
    if options.seeds is not None:
        study = study.with_seeds(options.seeds)
    return study.model_copy(update={"settings": [*study.settings, *options.set]})


def write(study: Study) -> None:
    """results.json, results.md and the plots; the tables are printed, too.

    Raises:
        StudyError: no run is done; or results.json has a run that these lack, and stays.
    """
    results = results_of(study)
    if not results["runs"]:
        raise StudyError(f"no run of the study is done in {study.output}: nothing is written")
    told, file = markdown(results), study.output / "results.json"
    print(told)
    there = json.loads(text)["runs"] if file.exists() and (text := file.read_text()) else []
    if lost := sorted({*map(_name, there)} - {*map(_name, results["runs"])}):
        raise StudyError(
            f"{file} has {len(lost)} runs that these results lack, such as {lost[0]}: nothing is "
            "written; ask for all of them, with their folders there, or remove that file"
        )
    study.output.mkdir(parents=True, exist_ok=True)
    write_json(file, results, indent=1)
    (study.output / "results.md").write_text(told + "\n")
    draw_all(study, study.output / "plots")
    print(f"\nresults.json, results.md and plots: {study.output}")


def _name(run: dict[str, Any]) -> str:
    return f"{run['method']}, seed {run['seed']}"


if __name__ == "__main__":
    sys.exit(main())
