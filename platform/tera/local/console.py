"""Progress of `tera serve` on a terminal, and line by line where there is none."""

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tera.local.serve import RunningPlatform


class StageConsole:
    """Shows each stage with the seconds it took."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name = ""
        self._began = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def stage(self, name: str) -> None:
        """Show that a stage begins."""
        self._name, self._began = name, time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(f"… {name}", total=None)
            self._bar.start()
        else:
            self._console.print(f"… {escape(name)}", highlight=False)

    def progress(self, text: str, done_ratio: float | None = None) -> None:
        """Show how far the current stage has got."""
        if self._bar is not None and self._task is not None:
            total = None if done_ratio is None else 1.0
            self._bar.update(
                self._task,
                description=f"… {self._name}: {text}",
                total=total,
                completed=done_ratio or 0.0,
            )
        elif done_ratio is None:
            self._console.print(f"  {escape(text)}", highlight=False)

    def done(self, text: str = "") -> None:
        """Show that the current stage has succeeded."""
        self._end("[green]✓[/]", f" ({text})" if text else "")

    def failed(self) -> None:
        """Show that the current stage has failed."""
        self._end("[red]✗[/]")

    def _end(self, sign: str, detail: str = "") -> None:
        if self._bar is not None:
            # Ends the line, so that later output starts below it, and restores the cursor.
            self._bar.stop()
            self._bar = None
        seconds = time.monotonic() - self._began
        self._console.print(
            f"{sign} {escape(self._name + detail)} {seconds:.1f} s", highlight=False
        )

    def ready(self, platform: RunningPlatform) -> None:
        """Print how to use the platform, ready to paste."""
        url = f"{platform.base_url}/v1"
        self._console.print(f"[green]✓[/] Ready in {platform.seconds:.1f} s", highlight=False)
        self._console.print(
            f"""
Base URL  {url}
API key   {platform.api_key}

curl {url}/completions \\
  -H 'Authorization: Bearer {platform.api_key}' -H 'Content-Type: application/json' \\
  -d '{{"model": "{platform.model}", "prompt": "The capital of France is", "max_tokens": 16}}'

from openai import OpenAI
client = OpenAI(base_url="{url}", api_key="{platform.api_key}")
answer = client.completions.create(
    model="{platform.model}", prompt="The capital of France is", max_tokens=16)
print(answer.choices[0].text)

Ctrl-C stops everything.""",
            markup=False,
            highlight=False,
        )
