"""Whether a bundle's model belongs to the data that a recipe names."""

from aum_compress.bundle import Bundle
from aum_compress.errors import BundleError, join_problems
from aum_compress.workspace import Workspace


def require_same_data(space: Workspace, bundle: Bundle) -> None:
    """The model has the labels of the recipe's data, and reads their features as the recipe makes them.

    Raises:
        BundleError: with all that differs.
    """
    card, problems = bundle.card, []
    if card.labels != space.labels:
        problems.append(f"labels: knows {', '.join(card.labels)}; the recipe's data have {', '.join(space.labels)}")
    known, made = (_flat(spec.model_dump(mode="json")) for spec in (card.input, space.spec))
    problems += [
        f"{key}: reads {known.get(key)}; the recipe gives {made.get(key)}"
        for key in (*known, *(key for key in made if key not in known))
        if known.get(key) != made.get(key)
    ]
    if problems:
        heading = f"{bundle.path}: made of other data or features than those of recipe {space.recipe.name}:"
        mend = "Name the recipe and the data that it was trained with, or run the recipe anew"
        raise BundleError(f"{join_problems(heading, problems)}\n{mend}")


def _flat(spec: dict) -> dict:
    """`front_end` without its own level."""
    return {**spec["front_end"], **{key: value for key, value in spec.items() if key != "front_end"}}
