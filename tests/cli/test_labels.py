"""The labels of `fastdit sample`: by name, by number, and what could be both."""

import pytest

from fastdit import DiTConfig
from fastdit.cli.labels import parse_labels

SMALL = DiTConfig(hidden=16, n_layers=1, n_heads=1)
NUMBERED = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, ..., as folders are ordered


def config(names):
    return DiTConfig(num_classes=len(names))


def test_labels_without_names_are_numbers():
    assert parse_labels("3, 0", None, SMALL) == [3, 0]
    assert parse_labels(None, None, SMALL) == list(range(16))
    with pytest.raises(ValueError, match=r"expected a number in \[0, 16\), got 'cat'"):
        parse_labels("cat", None, SMALL)


def test_a_class_may_have_several_names_as_in_imagenet():
    names = ("tench, Tinca tinca", "goldfish", "drake", "drake, mallard")
    cfg = DiTConfig(num_classes=4)
    assert parse_labels("tinca TINCA, goldfish,mallard, drake, 3", names, cfg) == [0, 1, 3, 2, 3]
    with pytest.raises(ValueError, match="--labels: .*did you mean 'goldfish'"):
        parse_labels("goldfsh", names, cfg)


def test_a_name_goes_before_a_number():
    """A class folder named 10 is not the one with the number 10."""
    cfg = config(NUMBERED)
    with pytest.warns(
        UserWarning, match="2, a name and a number, was taken as the name of class 4"
    ):
        assert parse_labels("2", NUMBERED, cfg) == [4]
    with pytest.warns(
        UserWarning, match="10, a name and a number, was taken as the name of class 2"
    ):
        assert parse_labels("10", NUMBERED, cfg) == [2]
    assert parse_labels("0, 1", NUMBERED, cfg) == [0, 1]  # both readings agree
    some = ["ten", "10", "cat"]
    assert parse_labels("0,2,10", some, config(some)) == [0, 2, 1]
    with pytest.raises(ValueError, match="expected one of ten, 10, cat; got '2'"):
        parse_labels('"2"', some, config(some))


def test_case_matters_where_names_differ_by_it():
    names = ["A", "a", "Cardigan, Welsh corgi", "cardigan", "Tree"]
    assert parse_labels("A,a,cardigan,Cardigan,tree", names, config(names)) == [0, 1, 3, 2, 4]
    with pytest.warns(UserWarning, match="was taken as the name of class 2"):
        assert parse_labels("CARDIGAN, welsh corgi", names, config(names)) == [2]
    with pytest.raises(ValueError, match="one of 'Cat' and 'cat', which differ in case"):
        parse_labels("CAT", ["Cat", "cat"], DiTConfig(num_classes=2))


def test_names_may_contain_commas():
    names = ["a", "b", "a,b", 'say "x, y"', "3,4"]
    cfg = config(names)
    with pytest.warns(UserWarning, match="'a, b' was taken as the name of class 2; with quotes"):
        assert parse_labels("b,a,b", names, cfg) == [1, 2]
    with pytest.warns(
        UserWarning, match="3, a name and a number, was taken as the number of class 3"
    ):
        assert parse_labels('"a,b",3, "a" ,"b"', names, cfg) == [2, 3, 0, 1]
    assert parse_labels('"3"', names, cfg) == [4]
    assert parse_labels("a, a", names, cfg) == [0, 0]
    assert (
        parse_labels('say "x,y"', names, cfg) == parse_labels('"say ""x, y"""', names, cfg) == [3]
    )
    with pytest.warns(UserWarning, match="'3, 4' was taken as the name of class 4"):
        assert parse_labels("3,4", names, cfg) == [4]
    imagenet = ("tench, Tinca tinca", "goldfish")
    assert parse_labels("Tench, tinca tinca,1", imagenet, config(imagenet)) == [0, 1]


def test_an_unknown_name_among_many_is_one_readable_line():
    names = [f"Name {i}" for i in range(1000)]
    with pytest.raises(ValueError, match="Name 39, 960 more; got 'nome 7'; did you mean 'Name 7'"):
        parse_labels("nome 7", names, config(names))
