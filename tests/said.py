"What a user is told when something is wrong."
import pytest

from sae_nb.core import UserError


def sentence(f, *words):
    "What the `UserError` of `f` says: one line, with these words."
    with pytest.raises(UserError) as told: f()
    said = str(told.value)
    assert "\n" not in said and all(w in said for w in words), said
    return said
