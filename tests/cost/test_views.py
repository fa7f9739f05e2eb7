"""The views of a report change nothing that a person would say of an image."""

import torch

from t2i_spo_plugin.cost.views import VIEW_NAMES, fixed_views, is_blank, median


def test_there_is_one_view_for_each_name_and_the_first_is_the_image_itself():
    x = torch.rand(2, 3, 32, 32)
    seen = fixed_views(x)
    assert seen.shape == (len(VIEW_NAMES), 2, 3, 32, 32) and torch.equal(seen[0], x)
    assert torch.equal(seen[VIEW_NAMES.index("upside down")], x.flip(2, 3))
    assert torch.equal(seen[VIEW_NAMES.index("mirrored")], x.flip(3))


def test_a_small_thing_is_twice_as_large_in_the_quadrant_where_it_stands():
    x = torch.zeros(1, 3, 64, 64)
    x[..., 40:56, 8:24] = 1
    seen = fixed_views(x)
    area = seen.mean((1, 2, 3, 4)) / x.mean()
    assert float(area[VIEW_NAMES.index("bottom left")]) > 3.8
    for other in ("top left", "top right", "bottom right"):
        assert float(area[VIEW_NAMES.index(other)]) < 0.2, other


def test_the_median_removes_single_pixels_and_keeps_edges():
    x = torch.zeros(1, 3, 16, 16)
    x[..., 8:] = 1
    noisy = x.clone()
    noisy[..., 3, 3] = 1
    assert torch.equal(median(noisy), x)


def test_views_of_an_image_do_not_depend_on_its_batch():
    x = torch.rand(3, 3, 20, 28)
    assert torch.equal(fixed_views(x)[:, 1:2], fixed_views(x[1:2]))


def test_the_smallest_images_have_views_too():
    for shape in ((1, 1), (1, 5), (2, 3)):
        assert fixed_views(torch.rand(1, 3, *shape)).shape == (len(VIEW_NAMES), 1, 3, *shape)


def test_one_colour_and_a_soft_gradient_are_blank_and_a_twentieth_of_an_image_is_not():
    plain = torch.full((1, 3, 40, 60), 0.3)
    gradient = plain + torch.linspace(-0.2, 0.2, 60)
    spot = plain.clone()
    spot[..., :8, :15] = 0.9
    dust = plain.clone()
    dust[..., :4, :4] = 0.9
    assert is_blank(torch.cat([plain, gradient, spot, dust])).tolist() == [True, True, False, True]
    assert is_blank(torch.rand(1, 3, 1, 1)).item() and not is_blank(torch.rand(1, 3, 50, 1)).item()
