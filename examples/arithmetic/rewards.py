"""A reward function as users write them: keyword arguments, the other columns of the prompts file by name."""


def correct(*, prompt, completion, answer, **columns):
    """1 where the completion is the answer, white space around it aside, and nothing else."""
    return float(completion.strip() == answer)
