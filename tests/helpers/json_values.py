"""Any JSON value, for tests with random inputs."""

from hypothesis import strategies as st

NUMBERS = st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)


def json_values(numbers=NUMBERS, text=text, leaves: int = 6):
    """Lists and objects of up to three elements each, with up to `leaves` values in all."""

    def inside(inner):
        return st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3)

    return st.recursive(st.none() | st.booleans() | numbers | text, inside, max_leaves=leaves)
