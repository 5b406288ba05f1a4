"""Tar shards are read to their end, whatever is damaged in them."""

import gzip
import io
import tarfile

from hypothesis import given, settings
from hypothesis import strategies as st

from visual_ground.storage.shards import read_shard

COUNT = 6


def shard(count=COUNT, size=700):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(count):
            for suffix in ("png", "txt"):
                member = tarfile.TarInfo(f"folder/{i:03}.{suffix}")
                member.size = size
                tar.addfile(member, io.BytesIO(bytes([i + 1]) * size))
    return file.getvalue()


WHOLE = shard()
CONTENT = {f"folder/{i:03}": {name: bytes([i + 1]) * 700 for name in ("png", "txt")} for i in range(COUNT)}
MEMBER = 512 * 3  # One header, and 700 bytes in two blocks.


def read(data, folder):
    path = folder / "a.tar"
    path.write_bytes(data)
    samples = list(read_shard(path))
    return {s.key: dict(s.members) for s in samples if s.problem is None}, [s.problem for s in samples if s.problem]


def test_a_whole_shard_has_no_problem_also_compressed_or_without_the_zeros_at_its_end(tmp_path):
    for data in (WHOLE, gzip.compress(WHOLE), WHOLE[: MEMBER * 2 * COUNT]):
        assert read(data, tmp_path) == (CONTENT, [])


@given(st.integers(0, MEMBER * 2 * COUNT - 1))
@settings(max_examples=60)
def test_a_damaged_byte_costs_no_more_than_the_member_that_it_is_in(tmp_path_factory, place):
    data = bytearray(WHOLE)
    data[place] ^= 0xFF
    found, problems = read(bytes(data), tmp_path_factory.mktemp("shard"))
    member, in_header = divmod(place, MEMBER)[0], place % MEMBER < 512
    hit = (f"folder/{member // 2:03}", ("png", "txt")[member % 2])
    for key, members in CONTENT.items():
        for name, content in members.items():
            assert (key, name) == hit or found[key][name] == content
    assert bool(problems) == in_header and len(problems) <= 1
    assert all("a.tar" in problem for problem in problems)


@given(st.integers(1, len(WHOLE)))
@settings(max_examples=60)
def test_a_shard_that_was_cut_off_gives_all_that_is_whole(tmp_path_factory, length):
    found, problems = read(WHOLE[:length], tmp_path_factory.mktemp("shard"))
    whole = length // MEMBER
    names = [(key, name) for key, members in CONTENT.items() for name in members]
    assert all(found[key][name] == CONTENT[key][name] for key, name in names[:whole])
    assert bool(problems) == (length < MEMBER * len(names) and length % MEMBER > 0)


def test_what_is_no_shard_or_a_damaged_compressed_one_is_one_problem(tmp_path):
    zipped = gzip.compress(WHOLE)
    for data in (b"no shard at all", b"", zipped[: len(zipped) // 2]):
        found, problems = read(data, tmp_path)
        assert len(problems) == 1 and "\n" not in problems[0]
        assert all(CONTENT[key][name] == content for key in found for name, content in found[key].items())


def test_samples_of_one_name_that_follow_each_other_are_as_many_as_they_were(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for number in range(6):
            member = tarfile.TarInfo(f"a.{'txt' if number % 2 else 'png'}")
            member.size = 1
            shard.addfile(member, io.BytesIO(b"%d" % number))
    assert [sample.members for sample in read_shard(tmp_path / "a.tar")] == [
        {"png": b"0", "txt": b"1"},
        {"png": b"2", "txt": b"3"},
        {"png": b"4", "txt": b"5"},
    ]
