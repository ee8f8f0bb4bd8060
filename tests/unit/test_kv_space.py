"""The KV space: ids of different places never meet, and an id leads back to where it came from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.kv.space import LOCAL, MAPPED, MAX_BLOCKS, MAX_EXECUTORS, index_of, mapped_id, pool_of, remote_id

executors = st.integers(0, MAX_EXECUTORS - 1)
indices = st.integers(0, MAX_BLOCKS - 1)


@given(executors, indices)
def test_an_id_says_where_its_block_is(executor: int, index: int) -> None:
    remote, mapped = remote_id(executor, index), mapped_id(executor, index)
    assert (pool_of(remote), index_of(remote)) == (executor + 1, index)
    assert (pool_of(mapped), index_of(mapped)) == (executor + MAPPED, index)
    assert remote < MAPPED << 24 <= mapped < 2**31, "they never meet, and block tables are int32"


@given(indices)
def test_a_local_id_is_the_index_itself(index: int) -> None:
    assert (pool_of(index), index_of(index)) == (LOCAL, index)


@pytest.mark.parametrize(("executor", "index"), [(-1, 0), (MAX_EXECUTORS, 0), (0, -1), (0, MAX_BLOCKS)])
def test_what_does_not_fit_into_the_space_is_refused(executor: int, index: int) -> None:
    for block_id in (remote_id, mapped_id):
        with pytest.raises(ValueError, match="outside the KV space"):
            block_id(executor, index)
