"""Annotation files and what they get: a row for each kind of fault, from a file without one.

Every row is one line that names the file, what in it, and what is accepted; or it is used, and a
line counts what was left out.
"""

import copy
import json
import math
import re

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from bn_det.data.coco import CocoSource, load_coco
from bn_det.errors import InputError

HEIGHT, WIDTH = 6, 8
POLYGON = [1, 1, 5, 1, 5, 4, 1, 4]
RLE = coco_mask.encode(np.asfortranarray(np.tri(HEIGHT, WIDTH, dtype=np.uint8)))["counts"].decode()


def valid():
    """Two images, two categories, three annotations; all that pycocotools and masks need."""
    masks = [[POLYGON], {"size": [HEIGHT, WIDTH], "counts": RLE}]
    masks.append({"size": [HEIGHT, WIDTH], "counts": [10, 5, HEIGHT * WIDTH - 15]})
    return {
        "images": [
            {"id": k, "file_name": f"{k}.png", "height": HEIGHT, "width": WIDTH} for k in (1, 2)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {"id": k, "image_id": 1 + k % 2, "category_id": c, "bbox": [1, 1, 4, 3], "area": 12,
             "iscrowd": 0, "segmentation": mask}
            for k, c, mask in zip((5, 6, 7), (1, 3, 3), masks, strict=True)
        ],
    }  # fmt: skip


def changed(part, number, **values):
    def change(content):
        entry = content[part][number]
        for key, value in values.items():
            if value is None:
                del entry[key]
            else:
                entry[key] = value
        return content

    return change


def annotation(number=0, **values):
    return changed("annotations", number, **values)


def polygon(*values):
    return annotation(segmentation=[[1, 1, 5, 1, 5, 4, *values]])


def runs(**values):
    return annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": RLE, **values})


def twice(part):
    return lambda content: {**content, part: [*content[part], content[part][0]]}


NAN, INF = float("nan"), float("inf")
REFUSED = {
    "a list": (lambda content: [content], "is a list, and not in COCO's format"),
    "no images": (lambda content: {**content, "images": []}, "has no images"),
    "no list of images": (lambda content: {**content, "images": 3}, "has no list of images"),
    "no categories": (lambda content: {**content, "categories": []}, "has no categories"),
    "no annotations": (
        lambda content: {k: v for k, v in content.items() if k != "annotations"},
        "has no list of annotations",
    ),
    "image without id": (changed("images", 1, id=None), "image number 1 has no id"),
    "image with a list as id": (changed("images", 1, id=[1]), "image number 1 has no id"),
    "image with another kind of id": (changed("images", 1, id="b"), "ids of image are of several"),
    "image twice": (twice("images"), "two of image have the id 1"),
    "image without file": (changed("images", 0, file_name=None), "image 1: file_name: None"),
    "image of no height": (changed("images", 0, height=0), "image 1: height: 0 .*1 or more"),
    "image of broken width": (changed("images", 0, width=7.5), "image 1: width: 7.5 .*1 or more"),
    "image of NaN width": (changed("images", 0, width=NAN), "image 1: width: nan .*1 or more"),
    "image of many pixels": (changed("images", 0, width=10**8), "image 1: height and width: more"),
    "image of 10**12": (changed("images", 0, width=10**12), "image 1: height and width: more"),
    "image of 1e200": (changed("images", 0, height=1e200), "image 1: height and width: more"),
    "image of 10**400": (changed("images", 0, height=10**400), "image 1: height: 1000.* 1 or more"),
    "category twice": (twice("categories"), "two of category have the id 1"),
    "category without name": (changed("categories", 0, name=None), "category 1: name: None"),
    "half of a character": (
        changed("categories", 0, name="\ud800"),
        r"category 1: name: '.ud800' is not accepted; use text of UTF-8",
    ),
    "equal names": (changed("categories", 1, name="cat"), "categories 1 and 3 .* same name, 'cat'"),
    "annotation twice": (twice("annotations"), "two of annotation have the id 5"),
    "annotation is a string": (lambda c: {**c, "annotations": ["a"]}, "annotation number 0 has no"),
    "unknown category": (annotation(category_id=2), "annotation 5: category_id: 2 is none of"),
    "category is a list": (annotation(category_id=[1]), "category_id: .1. .* of a category, int"),
    "category is true": (annotation(category_id=True), "category_id: True .* of a category, int"),
    "category is a float": (annotation(category_id=3.0), "category_id: 3.0 .* of a category, int"),
    "image is a list": (annotation(image_id=[1]), "annotation 5: image_id: .* of an image, int"),
    "image is a string": (annotation(image_id="1"), "5: image_id: '1' .* the id of an image, int"),
    "image is true": (annotation(image_id=True), "5: image_id: True .* the id of an image, int"),
    "images are strings": (
        lambda content: {
            **content, "images": [{**i, "id": str(i["id"])} for i in content["images"]]
        },
        "annotation 5: image_id: 2 is not accepted; use the id of an image, str",
    ),
    "id of 65 bits": (changed("images", 1, id=2**63), f"image number 1: id: {2**63} .*"),
    "negative id of 65 bits": (
        changed("images", 1, id=-(2**63) - 1),
        f"image number 1: id: -{2**63 + 1} is not .* 64 bits, -{2**63} to {2**63 - 1}",
    ),
    "category of a long id": (
        changed("categories", 1, id=10**30),
        f"category number 1: id: {10**30} is not accepted; use an integer of 64 bits",
    ),
    "annotation of a long id": (annotation(1, id=2**63), f"annotation number 1: id: {2**63} is no"),
    "zero byte at the end": (
        changed("categories", 1, id="a\0"),
        r"category number 1: id: 'a.x00' is not accepted; use text that does not end with a zero",
    ),
    "no image": (annotation(image_id=None), "annotation 5: image_id: None .* of an image, int"),
    "crowd of 2": (annotation(iscrowd=2), "annotation 5: iscrowd: 2 .* use 0 or 1"),
    "to be ignored": (annotation(ignore=1), "annotation 5: ignore: 1 is not .* use iscrowd 1, or"),
    "area is a string": (annotation(area="12"), "annotation 5: area: '12' .* a number of pixels"),
    "area is a list": (annotation(area=[12]), "annotation 5: area: .12. .* a number of pixels"),
    "NaN area": (annotation(area=NAN), "annotation 5: area: nan .* a number of pixels"),
    "area of 1e308": (annotation(area=1e308), "annotation 5: area: 1e\\+308 .* 0 to 1e\\+10"),
    "area of 10**40": (annotation(area=10**40), "annotation 5: area: 10000.* 0 to 1e\\+10"),
    "huge area": (annotation(area=1e30), "annotation 5: area: 1e\\+30 .* 0 to 1e\\+10"),
    "no box": (annotation(bbox=None), "annotation 5: bbox: None .* x, y, width and height"),
    "three numbers": (annotation(bbox=[1, 1, 4]), "annotation 5: bbox: .* x, y, width"),
    "a string in a box": (annotation(bbox=[1, 1, 4, "3"]), "annotation 5: bbox: .* x, y, width"),
    "NaN in a box": (annotation(bbox=[1, NAN, 4, 3]), "annotation 5: bbox: .*nan.* x, y, width"),
    "infinite box": (annotation(bbox=[1, 1, INF, 3]), "annotation 5: bbox: .*inf.* x, y, width"),
    "huge box": (annotation(bbox=[1, 1, 10**400, 3]), "annotation 5: bbox: "),
    "box of 1e30": (annotation(bbox=[1, 1, 1e30, 3]), "annotation 5: bbox: .* far outside"),
    "box at -1e30": (annotation(bbox=[-1e30, 1, 4, 3]), "annotation 5: bbox: .* far outside"),
    "box of 1e308": (annotation(bbox=[1e308] * 4), "annotation 5: bbox: .* x, y, width and height"),
    "crowd of 1e30": (annotation(bbox=[1, 1, 1e30, 3], iscrowd=1), "5: bbox: .* far outside"),
    "negative width": (annotation(bbox=[5, 1, -4, 3]), "annotation 5: bbox: .* 0 or more"),
    "box far away": (annotation(bbox=[1, 1, 4, 90]), "annotation 5: bbox: .* far outside"),
    "NaN in a polygon": (polygon(NAN, 4), "annotation 5: segmentation: a polygon .* finite"),
    "infinite polygon": (polygon(-INF, 4), "annotation 5: segmentation: a polygon .* finite"),
    "polygon far away": (polygon(1, 1e9), "annotation 5: segmentation: a polygon is far outside"),
    "polygon at 1e300": (polygon(1, 1e300), "annotation 5: segmentation: a polygon is far outside"),
    "polygon at -1e300": (polygon(1, -1e300), "5: segmentation: a polygon is far outside"),
    "polygon at 1e308": (annotation(segmentation=[[1e308] * 6]), "5: segmentation: a polygon .* f"),
    "polygon at 10**40": (polygon(1, 10**40), "5: segmentation: a polygon is far outside"),
    "a string in a polygon": (polygon("1", 4), "annotation 5: segmentation: a polygon .* finite"),
    "polygon is no list": (annotation(segmentation=[3]), "annotation 5: segmentation: a polygon"),
    "mask is a string": (annotation(segmentation="ab"), "segmentation: 'ab' .* use polygons or"),
    "mask is true": (annotation(segmentation=True), "segmentation: True .* use polygons or RLE"),
    "RLE of another size": (runs(size=[WIDTH, HEIGHT]), "RLE of size \\[8, 6\\] .* has \\[6, 8\\]"),
    "RLE without size": (runs(size=3), "annotation 5: segmentation: an RLE of size 3"),
    "RLE that does not fill": (runs(counts=[3, 4]), "an RLE of 7 pixels .* \\[6, 8\\] has 48"),
    "RLE that overflows": (runs(counts=[3, 10**30]), "an RLE of 1000.* pixels .* has 48"),
    "RLE of a negative run": (runs(counts=[60, -12]), "the counts of an RLE are not accepted"),
    "RLE of NaN": (runs(counts=[NAN]), "the counts of an RLE are not accepted"),
    "RLE without counts": (runs(counts=7), "the counts of an RLE are not accepted"),
    "RLE that is cut": (runs(counts=RLE[:-1]), "an RLE of .* pixels .* has 48|counts of an RLE"),
    "RLE cut in a number": (runs(counts=RLE + "P"), "the counts of an RLE are not accepted"),
    "RLE of other letters": (runs(counts=RLE + "\x00"), "the counts of an RLE are not accepted"),
    "RLE that never ends": (runs(counts="o" * 50), "the counts of an RLE are not accepted"),
}  # fmt: skip
FOR_EVALUATION = {
    "id 0": (annotation(id=0), "annotation 0: id: 0 is not accepted; use an integer, 1 to 9223"),
    "negative id": (annotation(id=-3), "annotation -3: id: -3 is not accepted; use an integer, 1"),
    "ids are strings": (
        lambda content: {
            **content,
            "annotations": [{**a, "id": f"a{a['id']}"} for a in content["annotations"]],
        },
        "annotation 'a5': id: 'a5' is not accepted; use an integer, 1",
    ),
    "nearly empty box": (annotation(bbox=[1, 1, 1e-320, 3]), "annotation 5: bbox: .* empty box"),
    "empty box": (annotation(bbox=[1, 1, 0, 3]), "annotation 5: bbox: .* empty box, which .* AP"),
    "box outside": (annotation(bbox=[9, 1, 4, 3]), "annotation 5: bbox: .* box outside of its im"),
    "box before": (
        annotation(bbox=[1, -4, 4, 3]),
        "annotation 5: bbox: .* box outside of its image",
    ),
    "no area": (annotation(area=None), "annotation 5: area: None .* a number of pixels"),
    "no crowd": (annotation(iscrowd=None), "annotation 5: iscrowd: it has none; use 0 or 1"),
}
WITH_MASKS = {
    "no mask": (annotation(segmentation=None), "annotation 5: it has no segmentation"),
    "a line": (annotation(segmentation=[[1, 1, 4, 4]]), "annotation 5: it has no segmentation"),
}
LEFT_OUT = {
    "empty box": (annotation(1, bbox=[1, 1, 4, 0]), "with an empty box are left out: 1, .* is 6"),
    "box outside": (
        annotation(1, bbox=[9, 1, 4, 3]),
        "outside of their image are left out: 1",
    ),
    "unknown image": (annotation(1, image_id=9), "that the file does not have are left out: 1"),
}
USED = {
    "as it is": lambda content: content,
    "no segmentation": annotation(segmentation=None),
    "a short polygon": annotation(segmentation=[[1, 1, 4, 4]]),
    "one of two polygons is short": annotation(segmentation=[POLYGON, [1, 2]]),
    "no area": annotation(area=None),
    "far away in an unknown image": annotation(bbox=[1, 1, 1e6, 3], image_id=9),
    "rounded at the edge": annotation(bbox=[-0.4, -0.4, 9, 7]),
    "not to be ignored": annotation(ignore=0),
}
REACHES_OUT = {
    "right": annotation(bbox=[5, 1, 5, 3]),
    "below": annotation(bbox=[1, 1, 4, 8]),
    "left": annotation(bbox=[-2, 1, 4, 3]),
    "corners in the place of a size": annotation(bbox=[4, 1, 8, 4]),
}


def load(tmp_path, content, **needs):
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_coco("mine", CocoSource(str(path), str(tmp_path)), **needs)


def assert_refused(tmp_path, change, words, **needs):
    with pytest.raises(InputError, match=f"mine: .*mine.json: .*{words}") as e:
        load(tmp_path, change(valid()), **needs)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("needs", [{}, {"for_evaluation": True, "with_masks": True}], ids=len)
@pytest.mark.parametrize("row", REFUSED)
def test_refused(tmp_path, row, needs):
    assert_refused(tmp_path, *REFUSED[row], **needs)


@pytest.mark.parametrize("row", FOR_EVALUATION)
def test_refused_in_evaluation(tmp_path, row):
    assert_refused(tmp_path, *FOR_EVALUATION[row], for_evaluation=True)
    load(tmp_path, FOR_EVALUATION[row][0](valid()))


@pytest.mark.parametrize("row", WITH_MASKS)
def test_refused_with_masks(tmp_path, row):
    assert_refused(tmp_path, *WITH_MASKS[row], with_masks=True)
    load(tmp_path, WITH_MASKS[row][0](valid()))


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("null", "is a NoneType, and not in COCO's format"),
        ('{"images": [{"id": 1, "id": 2}]}', "is not valid JSON: the key 'id' stands twice in"),
        ('{"images": [], "images": []}', "is not valid JSON: the key 'images' stands twice in"),
    ],
    ids=["empty", "cut", "deep", "null", "a key twice", "a list twice"],
)
def test_no_json(tmp_path, text, words):
    with pytest.raises(InputError, match=f"mine: .*mine.json: {words}"):
        load(tmp_path, text)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "bytes"])
def test_no_text(tmp_path, encoding):
    """Detectron2 and pycocotools read UTF-8 alone, without a mark at its beginning."""
    path = tmp_path / "mine.json"
    content = json.dumps(valid())
    path.write_bytes(b"\xff\x00\xfe{" if encoding == "bytes" else content.encode(encoding))
    with pytest.raises(InputError, match="mine.json: is not valid JSON"):
        load_coco("mine", CocoSource(str(path), str(tmp_path)))


@pytest.mark.parametrize("row", LEFT_OUT)
def test_left_out(tmp_path, row, caplog):
    change, words = LEFT_OUT[row]
    dataset = load(tmp_path, change(valid()))
    (message,) = caplog.messages
    assert re.search(f"mine: .*mine.json: annotations .*{words}", message)
    assert sorted(dataset.coco.anns) == [5, 7]
    assert sum(len(record["annotations"]) for record in dataset.records) == 2


@pytest.mark.parametrize("needs", [{}, {"for_evaluation": True}], ids=len)
@pytest.mark.parametrize("row", REACHES_OUT)
def test_reaches_out(tmp_path, row, needs, caplog):
    dataset = load(tmp_path, REACHES_OUT[row](valid()), **needs)
    (message,) = caplog.messages
    assert message.endswith(
        "annotations with a box that reaches out of its image, where detections end: 1, the first "
        "of which is 5"
    )
    assert sorted(dataset.coco.anns) == [5, 6, 7]


@pytest.mark.parametrize("area, count", [(80, 0), (81, 1), (1e9, 1)])
def test_an_area_larger_than_its_image(tmp_path, area, count, caplog):
    """By rounding it may be: a pixel at each edge."""
    content = annotation(area=area)(valid())
    load(tmp_path, content)
    assert not caplog.messages
    load(tmp_path, content, for_evaluation=True)
    words = "mine.json: annotations whose area, .* is larger than their image: 1, .* is 5$"
    assert [bool(re.search(words, message)) for message in caplog.messages] == [True] * count


@pytest.mark.parametrize("row", USED)
def test_used(tmp_path, row):
    dataset = load(tmp_path, USED[row](valid()))
    assert [record["image_id"] for record in dataset.records] == [1, 2]
    assert dataset.category_names == ["cat", "dog"]


def test_sizes_that_are_floats(tmp_path):
    """What is made of them, such as a mask, takes integers."""
    change = changed("images", 0, height=float(HEIGHT), width=float(WIDTH))
    record = load(tmp_path, change(valid())).records[0]
    assert repr((record["height"], record["width"])) == repr((HEIGHT, WIDTH))


@pytest.mark.parametrize(
    "ids",
    [(-(2**63), 2**63 - 1), (2**63 - 2, 2**63 - 1), ("a\0b", "a")],
    ids=["signs", "near", "str"],
)
def test_ids_that_are_held(tmp_path, ids):
    """pycocotools sorts ids as an array; of perfect detections none has another image or class."""
    content, new = valid(), dict(zip((1, 2), ids, strict=True))
    for image in content["images"]:
        image["id"] = new[image["id"]]
    for of in content["annotations"]:
        of["image_id"] = new[of["image_id"]]
    dataset = load(tmp_path, content, for_evaluation=True)
    found = [{**a, "score": 0.9} for a in content["annotations"]]
    evaluation = COCOeval(dataset.coco, dataset.coco.loadRes(found), "bbox")
    evaluation.evaluate()
    seen = [of["dtIds"] for of in evaluation.evalImgs if of and of["aRng"] == [0, 1e10]]
    assert sum(map(len, seen)) == len(found)


@pytest.mark.parametrize("number", [5, 0])
def test_what_an_id_of_0_would_cost(tmp_path, number):
    """Perfect detections have AP 1, but where pycocotools takes a match for none."""
    content = annotation(id=number)(valid())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    dataset = load_coco("mine", CocoSource(str(path), str(tmp_path)))
    found = [{**copy.deepcopy(a), "score": 0.9} for a in content["annotations"]]
    evaluation = COCOeval(dataset.coco, dataset.coco.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert math.isclose(evaluation.stats[0], 1) == (number != 0)


@pytest.mark.parametrize("with_masks", [True, False])
def test_what_is_no_polygon_is_left_out_where_others_are(tmp_path, with_masks, caplog):
    content = annotation(segmentation=[POLYGON, [1, 2], [1, 1, 4, 4]])(valid())
    dataset = load(tmp_path, content, with_masks=with_masks)
    found = [a.get("segmentation") for r in dataset.records for a in r["annotations"]]
    assert [POLYGON] in found
    assert "some have fewer than three points, which are left out: 1, the first" in caplog.text
