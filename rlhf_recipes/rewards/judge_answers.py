"""Keep the answers of judges on disk, so that a resumed or repeated run asks nothing twice.

Several processes may use one file. Each answer is written at once, so a killed process loses none.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError

DEFAULT_FILE = "_judge_answers.sqlite"  # a push skips `_*`, and `overwrite` leaves it in the directory
WAIT_SECONDS = 60.0  # for other processes that write
AT_ONCE = 500  # keys in one query
DAMAGES = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
TABLE = """CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, end TEXT NOT NULL, tokens INTEGER NOT NULL
)"""

QUERY = "SELECT key, text, end, tokens FROM answers WHERE key"


@dataclass(frozen=True)
class Answer:
    """What a judge has answered.

    Args:
        text: Text of the answer.
        end: Why it ended: `stop`, `length` for the limit of tokens, or `refused`.
        tokens: Tokens of question and answer, as the server counts them; 0 if it does not.
    """

    text: str
    end: str
    tokens: int


class AnswerCache:
    """Keep answers by the hash of all that determines them.

    Args:
        file: SQLite file. It is made when the first answer is looked up.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)

    def check(self) -> None:
        """Check that the file can be read and written.

        Raises:
            ValueError: If it is damaged, or cannot be used.
        """
        try:
            with self._connected() as connection:
                (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                raise PermanentRewardError(self._damaged(state))
        except (PermanentRewardError, RewardCallError) as error:
            raise ValueError(str(error)) from error

    def known(self, keys: Iterable[str]) -> dict[str, Answer]:
        """Return the answers that are there, by key.

        Raises:
            PermanentRewardError: If the file is damaged.
            RewardCallError: If it cannot be used now.
        """
        keys = list(keys)
        found: dict[str, Answer] = {}
        with self._connected() as connection:
            for start in range(0, len(keys), AT_ONCE):
                some = keys[start : start + AT_ONCE]
                marks = ", ".join("?" * len(some))
                rows = connection.execute(f"{QUERY} IN ({marks})", some)
                found |= {key: Answer(*answer) for key, *answer in rows}
        return found

    def keep(self, key: str, answer: Answer) -> Answer:
        """Write an answer, and return the one that counts: the first, if another process has written one before.

        Raises:
            PermanentRewardError: If the file is damaged.
            RewardCallError: If it cannot be used now.
        """
        with self._connected() as connection:
            connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", (key, *astuple(answer)))
            return Answer(*connection.execute(f"{QUERY} = ?", (key,)).fetchone()[1:])

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """Open the file for one use: a connection must not be shared by threads, or inherited by a process."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.file, timeout=WAIT_SECONDS, isolation_level=None)) as connection:
                connection.execute(TABLE)
                yield connection
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorname", "").startswith(DAMAGES):
                raise PermanentRewardError(self._damaged(str(error))) from error
            raise RewardCallError(f"The answers of a judge cannot be kept in {self.file}: {error}") from error
        except OSError as error:
            raise RewardCallError(f"The answers of a judge cannot be kept in {self.file}: {error.strerror}") from error

    def _damaged(self, reason: str) -> str:
        why = " ".join(reason.split())
        return (
            f"The file with the answers of a judge is damaged: {self.file} ({why}). Put a copy of it back, or "
            "move it away: its questions are then asked again."
        )
