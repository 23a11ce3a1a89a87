"""Nearest codes of tables and product sets against a sort of all distances."""

import itertools

import pytest
import torch

from vistok.quantizers.neighbours import nearest_rows, product_neighbours, table_neighbours


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid_table(codes, dim, seed=0):
    """A table full of ties and duplicates: small integers."""
    return torch.randint(-1, 2, (codes, dim), generator=torch.Generator().manual_seed(seed)).double()


def sorted_neighbours(table, index):
    """All rows in the order of (the row itself, distance, index), and their squared distances, with Python's sort."""
    distances = (table - table[index]).square().sum(1).tolist()
    order = sorted(range(len(table)), key=lambda row: (row != index, distances[row], row))
    return order, [distances[row] for row in order]


# ---- tables


@pytest.mark.parametrize("block", [1, 40, 1 << 22])
@pytest.mark.parametrize("tokens", [3, 60])
@pytest.mark.parametrize("k", [1, 5, 30])
@pytest.mark.parametrize(
    "table", [random(30, 3), grid_table(30, 2), torch.zeros(30, 2).double()], ids=["random", "ties", "zero"]
)
def test_table_neighbours_equal_a_full_sort(table, tokens, k, block, monkeypatch):
    monkeypatch.setattr("vistok.quantizers.neighbours.TABLE_BLOCK", block)
    indices = torch.randint(30, (tokens,), generator=torch.Generator().manual_seed(1))
    found, distances = table_neighbours(table, indices, k)
    for row, index in enumerate(indices.tolist()):
        order, expected = sorted_neighbours(table, index)
        assert found[row].tolist() == order[:k]
        assert torch.allclose(distances[row], torch.tensor(expected[:k], dtype=torch.float64), atol=1e-12)


def test_the_row_itself_leads_its_duplicates_at_distance_zero():
    table = torch.tensor([[0.0], [5.0], [5.0], [5.0], [1.0]])
    found, distances = table_neighbours(table, torch.tensor([2, 3, 4]), 3)
    assert found.tolist() == [[2, 1, 3], [3, 1, 2], [4, 0, 1]]
    assert distances.tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 16]]


@pytest.mark.parametrize("tokens", [2, 9])
def test_dropped_tokens_have_dropped_neighbours(tokens):
    found, distances = table_neighbours(random(5, 2), torch.full((tokens,), -1), 3)
    assert (found == -1).all() and (distances == 0).all()


@pytest.mark.parametrize("k", [1, 4, 25])
def test_nearest_rows_of_latents_equal_a_full_sort(k):
    latents, table = random(40, 3, seed=1), random(25, 3)
    found, distances = nearest_rows(latents, table, k)
    expected = (latents[:, None] - table).square().sum(-1).sort(dim=1, stable=True)
    assert torch.equal(found, expected.indices[:, :k])
    assert torch.allclose(distances, expected.values[:, :k])


def test_distances_are_held_in_blocks(monkeypatch):
    """A hundred queries in a table of fifty rows, three queries at a time."""
    held, original = [], torch.cdist

    def recorded(*arguments, **options):
        held.append(original(*arguments, **options))
        return held[-1]

    monkeypatch.setattr("vistok.quantizers.neighbours.TABLE_BLOCK", 150)
    monkeypatch.setattr(torch, "cdist", recorded)
    nearest_rows(random(100, 3, seed=1), random(50, 3), 4)
    table_neighbours(random(50, 3), torch.arange(100) % 50, 4)
    assert len(held) == 34 + 17 and max(block.numel() for block in held) == 150


def test_latents_that_are_not_finite_get_valid_rows():
    latents = torch.tensor([[float("nan"), 0.0], [float("inf"), 0.0], [0.0, 1.0]])
    found, _ = nearest_rows(latents, random(10, 2).float(), 4)
    assert ((found >= 0) & (found < 10)).all() and all(len(set(row)) == 4 for row in found.tolist())


def test_half_precision_tables_are_compared_in_float32():
    table = random(20, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, distances = table_neighbours(table, torch.arange(20), 6)
    expected, _ = table_neighbours(table.double(), torch.arange(20), 6)
    assert distances.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("k", [0, 6, -1])
def test_k_out_of_range_is_named(k):
    message = f"k must lie between 1 and the number of codes, 5; got {k}"
    with pytest.raises(ValueError, match=message):
        table_neighbours(random(5, 2), torch.zeros(1, dtype=torch.int64), k)
    with pytest.raises(ValueError, match=message):
        nearest_rows(random(1, 2), random(5, 2), k)


# ---- products


def all_combinations(tables, index):
    """All combinations in the order of (the code itself, distance, indices), and their squared distances."""
    distances = [(table - table[own]).square().sum(1).tolist() for table, own in zip(tables, index, strict=True)]
    scored = [
        (
            combination != tuple(index),
            sum(column[i] for column, i in zip(distances, combination, strict=True)),
            combination,
        )
        for combination in itertools.product(*(range(len(table)) for table in tables))
    ]
    scored.sort()
    return [combination for _, _, combination in scored], [distance for _, distance, _ in scored]


LINE = torch.arange(6, dtype=torch.float64).unsqueeze(1)


@pytest.mark.parametrize("k", [1, 2, 7, 30, 72])
@pytest.mark.parametrize(
    "tables",
    [
        [random(6, 2), random(3, 2, seed=1), random(4, 1, seed=2)],
        [LINE, LINE[:3], LINE[:4]],
        [LINE[:2]] * 3 + [LINE[:9]],
    ],
    ids=["random", "lattice", "small"],
)
def test_product_neighbours_equal_a_full_sort(tables, k):
    sizes = [len(table) for table in tables]
    k = min(k, torch.tensor(sizes).prod().item())
    generator = torch.Generator().manual_seed(3)
    indices = torch.stack([torch.randint(size, (8,), generator=generator) for size in sizes], 1)
    parts = []
    for table, column in zip(tables, indices.unbind(1), strict=True):
        found, distances = table_neighbours(table, column, min(k, len(table)))
        parts.append((found.unsqueeze(2), distances))
    found, distances = product_neighbours(parts, k)
    for row, index in enumerate(indices.tolist()):
        combinations, expected = all_combinations(tables, index)
        assert [tuple(one) for one in found[row].tolist()] == combinations[:k]
        assert torch.allclose(distances[row], torch.tensor(expected[:k], dtype=torch.float64), rtol=1e-6)


def test_the_code_itself_leads_its_duplicates_in_a_product():
    table = torch.tensor([[0.0], [0.0], [1.0]])
    own = torch.tensor([1, 1])
    found, distances = table_neighbours(table, own, 3)
    combined, sums = product_neighbours([(found.unsqueeze(2), distances)] * 2, 5)
    assert combined[0].tolist() == [[1, 1], [0, 0], [0, 1], [1, 0], [0, 2]]
    assert sums[0].tolist() == [0, 0, 0, 0, 1]


def test_equal_sums_are_equal_whatever_the_order_of_the_terms():
    """0.1 + 0.37 + 0.9 is not 0.9 + 0.37 + 0.1 in floating point."""
    steps = [0.0, 0.1, 0.37, 0.9]
    for dtype in (torch.float64, torch.float32):
        parts = [(torch.arange(4).view(1, 4, 1), torch.tensor([steps], dtype=dtype))] * 3
        found, distances = product_neighbours(parts, 64)
        assert distances.dtype == dtype
        combinations = [tuple(one) for one in found[0].tolist()]
        key = [(round(sum(sorted(steps[i] for i in one)), 5), one) for one in combinations]
        assert key == sorted(key) and len(set(combinations)) == 64


def test_products_of_products_equal_one_product():
    tables, k = [LINE, LINE[:3], LINE[:4], LINE[:2]], 20
    index = torch.tensor([[2, 1, 3, 0], [0, 0, 0, 1]])
    parts = []
    for table, column in zip(tables, index.unbind(1), strict=True):
        found, distances = table_neighbours(table, column, min(k, len(table)))
        parts.append((found.unsqueeze(2), distances))
    nested = [product_neighbours(parts[:2], 18), product_neighbours(parts[2:], 8)]
    for one, other in zip(product_neighbours(nested, k), product_neighbours(parts, k), strict=True):
        assert torch.equal(one, other)


def test_product_memory_does_not_grow_with_the_square_of_k():
    """Two factors of 400 entries, k = 400: 160 000 pairs per token, of which about 2 600 are looked at."""
    seen = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seen.extend(one.numel() for one in torch.utils._pytree.tree_leaves(result) if isinstance(one, torch.Tensor))
            return result

    parts = [(torch.arange(400).view(1, -1, 1), torch.arange(400, dtype=torch.float64).view(1, -1))] * 2
    with Largest():
        _, distances = product_neighbours(parts, 400)
    assert max(seen) < 3000 and distances.max() < 28  # the sums 0..27 have 406 pairs


def test_too_many_neighbours_of_a_product_are_refused():
    parts = [(torch.arange(2).view(1, 2, 1), torch.zeros(1, 2))] * 2
    with pytest.raises(ValueError, match="number of codes, 4; got 5"):
        product_neighbours(parts, 5)


def test_neighbours_compile_without_graph_breaks():
    table = random(20, 3)

    def both(indices):
        found, distances = table_neighbours(table, indices, 5)
        return product_neighbours([(found.unsqueeze(2), distances)] * 2, 7)

    for tokens in (4, 40):
        indices = torch.arange(tokens) % 20
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        for one, other in zip(compiled(indices), both(indices), strict=True):
            assert torch.equal(one, other)
