"""How long a run is, and when something is due in it."""

from dataclasses import dataclass

from fastvae.config import Config


@dataclass(frozen=True)
class Plan:
    """In steps and samples."""

    steps: int
    samples_per_epoch: int
    batch_size: int

    @classmethod
    def of(cls, config: Config, samples_per_epoch: int) -> "Plan":
        steps = max(1, round(config.epochs * samples_per_epoch / config.batch_size))
        return cls(min(steps, config.max_steps or steps), samples_per_epoch, config.batch_size)

    @property
    def steps_per_epoch(self) -> float:
        return self.samples_per_epoch / self.batch_size

    def epoch(self, done: int) -> float:
        return done * self.batch_size / self.samples_per_epoch

    def is_line_due(self, done: int, config: Config) -> bool:
        """Whether step number `done` (from 1) ends with a line in the log."""
        return done % config.log_every == 0 or self.is_evaluation_due(done, config)

    def is_evaluation_due(self, done: int, config: Config) -> bool:
        return done == self.steps or self._crosses(done, config.eval_every)

    def evaluations(self, config: Config) -> int:
        """How many evaluations the whole run makes."""
        return int(self.epoch(self.steps) / config.eval_every) + 1

    def is_checkpoint_due(self, done: int, config: Config) -> bool:
        return done == self.steps or self._crosses(done, config.checkpoint_every)

    def undisturbed(self, done: int, config: Config) -> int:
        """Steps from `done` to the next after which something is logged, measured or kept."""
        end = done + 1
        while not (self.is_line_due(end, config) or self.is_checkpoint_due(end, config)):
            end += 1
        return end - done

    def _crosses(self, done: int, epochs: float) -> bool:
        """Whether step number `done` completed a multiple of so many epochs."""
        return int(self.epoch(done) / epochs) > int(self.epoch(done - 1) / epochs)
