"""A reward function as users write them: keyword arguments, the other columns of the prompts file by name."""


def correct(*, prompt, completion, answer, **columns):
    """1 if the completion is the answer and nothing else, apart from white space around it; else 0."""
    return float(completion.strip() == answer)
