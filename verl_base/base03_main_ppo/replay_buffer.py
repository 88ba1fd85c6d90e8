"""verl's ReplayBuffer, which looks for finished completions every 2 seconds; a tiny model has them sooner."""

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class EagerReplayBuffer(ReplayBuffer):
    def __init__(self, **settings):
        super().__init__(**settings, poll_interval=0.1)
