"""What to learn: prompts, rewards and splits."""

from midtune.tasks.check import check_reward, doubts, scored_samples
from midtune.tasks.games.table import GAMES
from midtune.tasks.rewards import Reward, completion_of, parts_of
from midtune.tasks.sandbox.sandbox import open_sandbox
from midtune.tasks.sources import programs
from midtune.tasks.sources.gym import list_tasks, task_arguments
from midtune.tasks.split import Row
from midtune.tasks.task import Task, load_task

__all__ = [
    "GAMES",
    "Reward",
    "Row",
    "Task",
    "check_reward",
    "completion_of",
    "doubts",
    "list_tasks",
    "load_task",
    "open_sandbox",
    "parts_of",
    "programs",
    "scored_samples",
    "task_arguments",
]
