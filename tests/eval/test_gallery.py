import pytest
import torch

from vistok.eval.metric import Originals, Pairs
from vistok.eval.report.gallery import Gallery


def pairs(index, values, name="psnr", size=4):
    """Images whose pixels tell their number, so that a picture can be told apart."""
    index = torch.as_tensor(index)
    images = (index % 251).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size).contiguous()
    originals = Originals(index, [f"image {int(i)}" for i in index], torch.zeros(len(index)), images)
    judged = {} if values is None else {name: torch.as_tensor(values, dtype=torch.float32)}
    return Pairs(originals, 255 - images, values=judged)


def shown(gallery):
    return [(one.kind, one.index, one.value) for one in gallery.pictures()]


def same(one, other):
    left, right = one.pictures(), other.pictures()
    assert [(p.index, p.key, p.kind, p.value_name, p.value) for p in left] == [
        (p.index, p.key, p.kind, p.value_name, p.value) for p in right
    ]
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.original, b.original) and torch.equal(a.reconstruction, b.reconstruction)


def fed(batches, **settings):
    gallery = Gallery(**settings)
    for batch in batches:
        gallery.update(batch)
    return gallery


@pytest.fixture
def values():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 12, (100,), generator=generator).float()  # many are equal


def test_best_and_worst_are_those_of_a_sort(values):
    gallery = fed([pairs(range(i, i + 10), values[i : i + 10]) for i in range(0, 100, 10)], count=7)
    order = sorted(range(100), key=lambda i: (-values[i], i))
    assert [i for kind, i, _ in shown(gallery) if kind == "best"] == order[:7]
    order = sorted(range(100), key=lambda i: (values[i], i))
    assert [(i, v) for kind, i, v in shown(gallery) if kind == "worst"] == [(i, float(values[i])) for i in order[:7]]


def test_lower_is_better_for_lpips_which_is_preferred_to_psnr():
    batch = pairs([0, 1, 2], [10.0, 20.0, 30.0])
    batch.values["lpips_alex"] = torch.tensor([0.1, 0.3, 0.2])
    gallery = fed([batch], count=1)
    assert shown(gallery) == [("best", 0, pytest.approx(0.1)), ("worst", 1, pytest.approx(0.3))]
    assert gallery.pictures()[0].value_name == "lpips_alex"


def test_pictures_are_those_of_their_image(values):
    gallery = fed([pairs(range(50), values[:50]), pairs(range(50, 100), values[50:])], previews=[77, 3], count=5)
    for one in gallery.pictures():
        assert one.key == f"image {one.index}"
        assert one.original.shape == (3, 4, 4) and one.original.dtype == torch.uint8
        assert (one.original == one.index).all() and (one.reconstruction == 255 - one.index).all()


def test_previews_keep_the_order_asked_for(values):
    gallery = fed([pairs(range(i, i + 5), values[i : i + 5]) for i in range(0, 20, 5)], previews=[13, 2, 13, 7, 500])
    assert [i for kind, i, _ in shown(gallery) if kind == "preview"] == [13, 2, 7]


def test_merge_of_unequal_shards_equals_one_pass(values, tmp_path):
    settings = {"previews": [90, 4], "count": 6}
    whole = fed([pairs(range(100), values)], **settings)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1)).tolist()
    merged = Gallery(**settings)
    for number, shard in enumerate((order[:13], order[13:80], order[80:])):
        part = fed([pairs(shard[i : i + 9], values[shard[i : i + 9]]) for i in range(0, len(shard), 9)], **settings)
        torch.save(part.state_dict(), tmp_path / f"{number}.pt")
        merged.merge(torch.load(tmp_path / f"{number}.pt", weights_only=True))
    same(merged, whole)


def test_state_can_be_taken_in_the_middle(values):
    gallery = fed([pairs(range(60), values[:60])], previews=[1, 99], count=3)
    gallery.state_dict()
    gallery.update(pairs(range(60, 100), values[60:]))
    same(gallery, fed([pairs(range(100), values)], previews=[1, 99], count=3))


def test_state_does_not_grow_with_the_images():
    gallery = Gallery(previews=[0], count=2)
    for i in range(0, 2000, 10):
        gallery.update(pairs(range(i, i + 10), torch.arange(i, i + 10).float()))
        assert len(gallery._keys) <= 5 + 10 * 32
    state = gallery.state_dict()
    assert sorted(state["keys"]) == [0, 1, 1998, 1999]  # the preview is also the worst
    assert sum(len(shelf["index"]) for shelf in state["shelves"].values()) == 5


def test_values_that_are_not_finite_are_neither_best_nor_worst():
    gallery = fed([pairs(range(5), [float("nan"), 1.0, float("inf"), 2.0, -float("inf")])], previews=[0], count=2)
    assert shown(gallery) == [
        ("preview", 0, None),
        ("best", 3, 2.0),
        ("best", 1, 1.0),
        ("worst", 1, 1.0),
        ("worst", 3, 2.0),
    ]


def test_without_values_only_previews_are_kept():
    gallery = fed([pairs(range(5), None)], previews=[2], count=3)
    assert shown(gallery) == [("preview", 2, None)]
    other = Gallery(previews=[2], count=3)
    other.merge(gallery.state_dict())
    same(other, gallery)


def test_empty_state_merges():
    gallery = Gallery(previews=[0])
    gallery.merge(Gallery(previews=[0]).state_dict())
    assert gallery.pictures() == [] and gallery.compute() == {}


def test_galleries_of_different_judges_do_not_merge():
    gallery = fed([pairs(range(3), [1, 2, 3])])
    with pytest.raises(ValueError, match="psnr and by lpips_alex"):
        gallery.merge(fed([pairs(range(3), [1, 2, 3], "lpips_alex")]).state_dict())


@pytest.mark.parametrize(("settings", "words"), [({"count": -1}, "count"), ({"judge": "ris_std"}, "direction")])
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Gallery(**settings)
