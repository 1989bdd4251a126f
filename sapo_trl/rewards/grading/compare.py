"""Two shapes are equal when they are of one kind and their parts agree: sets in any order, tuples in theirs."""

from sapo_trl.rewards.grading.leaves import leaves_equal, squeezed
from sapo_trl.rewards.grading.policy import GraderOptions
from sapo_trl.rewards.grading.shapes import Group, Relation, Shape, Unreadable, is_name, read_shape


def shapes_equal(gold: Shape, answer: Shape, options: GraderOptions) -> bool:
    """Kind by kind; a relation `x = 5` counts as its value where the other side has no relation."""
    gold, answer = _without_names(gold, answer)
    if isinstance(gold, Unreadable) or isinstance(answer, Unreadable):
        return squeezed(gold.text) == squeezed(answer.text) if type(gold) is type(answer) else False
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return type(gold) is type(answer) and _relations_equal(gold, answer, options)
    if isinstance(gold, Group) or isinstance(answer, Group):
        return _groups_equal(_as_group(gold), _as_group(answer), options)
    return leaves_equal(gold.text, answer.text, options)


def _without_names(gold: Shape, answer: Shape) -> tuple[Shape, Shape]:
    """`x = 5` against `5`: the value of the one against the other. The names of two relations are compared."""
    if _is_named(answer) and not isinstance(gold, Relation):
        return gold, read_shape(answer.right)
    if _is_named(gold) and not isinstance(answer, Relation):
        return read_shape(gold.right), answer
    return gold, answer


def _is_named(shape: Shape) -> bool:
    """Whether the shape states a value: `x = 5`."""
    return isinstance(shape, Relation) and shape.operator == "=" and is_name(shape.left)


def _relations_equal(gold: Relation, answer: Relation, options: GraderOptions) -> bool:
    if gold.operator != answer.operator:
        return False
    if squeezed(gold.left) == squeezed(answer.left):
        same_right = shapes_equal(read_shape(gold.right), read_shape(answer.right), options)
        if same_right or (_is_named(gold) and not set(gold.left) & set(gold.right)):
            return same_right
    from sapo_trl.rewards.grading import symbolic  # sympy: only ever imported in a worker process

    sides = ((gold.left, gold.right), (answer.left, answer.right))
    if gold.operator in ("=", r"\neq"):
        return symbolic.equations_equal(*sides)
    return symbolic.sign_of_factor(*sides) > 0


def _as_group(shape: Shape) -> Group:
    return shape if isinstance(shape, Group) else Group("one", (shape,))


_UNORDERED = ("list", "set", "union", "one")


def _groups_equal(gold: Group, answer: Group, options: GraderOptions) -> bool:
    if gold.kind == "one" and answer.kind == "list":  # "1/2 or 0.5" is one answer in two forms
        return all(shapes_equal(gold.parts[0], part, options) for part in answer.parts)
    if gold.kind in _UNORDERED and answer.kind in _UNORDERED:
        if _names(gold) != _names(answer) and len(_names(gold) | _names(answer)) > 1:  # x = 1, y = 2 against 1, 2
            return {gold.kind, answer.kind} == {"list"} and _same_sequence(gold.parts, answer.parts, options)
        return _same_elements(gold.parts, answer.parts, options)
    if gold.kind == answer.kind:
        return _same_sequence(gold.parts, answer.parts, options)
    if gold.is_interval or answer.is_interval:
        return False
    kinds = {gold.kind, answer.kind}
    if options.tuple_as_set and kinds <= {"()", "set", "list"}:
        return _same_elements(gold.parts, answer.parts, options)
    if options.bare_list_as_tuple and kinds == {"()", "list"}:
        return _same_sequence(gold.parts, answer.parts, options)
    return False


def _names(group: Group) -> set[str]:
    """The different names in a list of assignments: its order means something where there are several."""
    return {part.left for part in group.parts if _is_named(part)}


def _same_sequence(gold: tuple[Shape, ...], answer: tuple[Shape, ...], options: GraderOptions) -> bool:
    return len(gold) == len(answer) and all(shapes_equal(g, a, options) for g, a in zip(gold, answer, strict=True))


def _same_elements(gold: tuple[Shape, ...], answer: tuple[Shape, ...], options: GraderOptions) -> bool:
    """The same elements in any order, each element of the gold met by one of its own."""
    left = list(dict.fromkeys(answer))
    wanted = list(dict.fromkeys(gold))
    if len(left) != len(wanted):
        return False
    for element in wanted:
        match = next((candidate for candidate in left if shapes_equal(element, candidate, options)), None)
        if match is None:
            return False
        left.remove(match)
    return True
