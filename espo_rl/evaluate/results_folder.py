"""What an evaluation leaves in its folder.

`settings.json`, one JSONL file for each data set with a line for each problem, and `results.json`.
Lines are appended and never changed; the last one of a problem counts, so an evaluation that was
killed goes on where it stopped and counts nothing twice.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from espo_rl.evaluate.results import EvaluationError, ProblemResult
from espo_rl.record.json_files import write_json
from espo_rl.record.output import OutputError, check_empty
from espo_rl.types import Problem


class ResultsFolder:
    """The folder of one command's results. Its settings are those of its first result, for good.

    Args:
        flag: that named the folder.

    Raises:
        EvaluationError: the folder cannot be written, holds something else, or was begun with other
            settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, flag: str = "--out") -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))  # as it is read back
        file = path / "settings.json"
        try:
            if not file.exists():
                check_empty(path, flag)
            path.mkdir(parents=True, exist_ok=True)
            self._held = file.open("a+")
            there = json.loads(file.read_text() or "{}")
            ours = isinstance(there, dict) and (not there or there.keys() & self.settings.keys())
            if ours and self._alone() and not self._begun():
                self._held.truncate(0)
                self._held.write(json.dumps(self.settings, indent=2) + "\n")
                self._held.flush()
            # As long as the command lives: no other one changes them before the first result.
            fcntl.flock(self._held, fcntl.LOCK_SH)
            there = json.loads(file.read_text())
        except OutputError as error:
            raise EvaluationError(str(error)) from error
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"{flag}: cannot use {path} ({error}); choose another folder"
            ) from error
        if not ours:
            raise EvaluationError(f"{flag}: {file} is no evaluation's; choose another folder")
        if there != self.settings:
            names = [*self.settings, *(name for name in there if name not in self.settings)]
            changed = [
                f"  {name}: {there.get(name)!r} there, {self.settings.get(name)!r} now"
                for name in names
                if there.get(name) != self.settings.get(name)
            ]
            raise EvaluationError(
                f"{path} holds results of other settings:\n"
                + "\n".join(changed)
                + f"\ngive the same ones to go on with it, or another {flag}"
            )

    def _alone(self) -> bool:
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _begun(self) -> bool:
        """Whether any result is there; what servers log is none."""
        logs = self.path / "logs"
        return any(
            file.stat().st_size
            for file in self.path.rglob("*")
            if file.is_file() and file.name != "settings.json" and logs not in file.parents
        )

    def write(self, results: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
        """Write results.json: these results, and what it has of other data sets.

        Returns:
            the data sets of which it had more problems, in words.
        """
        file = self.path / "results.json"
        try:
            there = json.loads(file.read_bytes())["results"] if file.exists() else {}
            had = {name: there[name]["problems"] for name in results if name in there}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{file} is damaged ({error}); remove it: the same command writes it anew"
            ) from error
        write_json(file, {"results": {**there, **results}, "settings": self.settings, **about})
        return [
            f"{name}: {number} problems were in results.json, {results[name]['problems']} are now; "
            "the same command without --limit counts all again"
            for name, number in had.items()
            if number > results[name]["problems"]
        ]

    def results(self, name: str, problems: Sequence[Problem]) -> ResultsFile:
        """The results of one data set, to be used as a context manager."""
        return ResultsFile(self.path / f"{name}.jsonl", problems)


class ResultsFile:
    """One data set's results: those there already in `done`, by index.

    Raises on entering:
        EvaluationError: somebody else is writing it, it is damaged, or it is of other problems.
    """

    def __init__(self, path: Path, problems: Sequence[Problem]) -> None:
        self.path = path
        self.done: dict[int, ProblemResult] = {}
        self._problems = problems

    def __enter__(self) -> ResultsFile:
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError as error:
            self._file.close()
            raise EvaluationError(f"another evaluation is writing {self.path}") from error
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):  # what a kill left of a line
                self._file.truncate(whole)
                break
            whole += len(line)
            try:
                result = msgspec.json.decode(line, type=ProblemResult)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise EvaluationError(
                    f"{self.path}, line {number}, is damaged ({error}); remove that line"
                ) from error
            if result.index >= len(self._problems):
                continue  # beyond this command's --limit
            problem = self._problems[result.index]
            if (problem.prompt, problem.answer) != (result.problem, result.answer):
                raise EvaluationError(
                    f"{self.path}, line {number}, is of another problem than the data now has at "
                    f"{result.index}; the data has changed: choose another --out"
                )
            # What is to be completed will be written again, with its texts.
            failed = any(sample.error for sample in result.samples)
            self.done[result.index] = result if failed else result.without_texts()

    def append(self, result: ProblemResult) -> None:
        """Write a finished problem, so that it survives whatever comes next."""
        self._file.write(msgspec.json.encode(result) + b"\n")
        self._file.flush()
