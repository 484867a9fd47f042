"""The report and the comparison, in a real browser."""

import json
import math
import re
from dataclasses import replace

import pytest

from lora_plugins.tasks.pages import (
    ClassResult,
    Costs,
    Metric,
    SampleRecord,
    render_comparison,
    render_report,
    render_samples,
)

from ..browser import DESKTOP, PHONE, needs_browser, running_browser
from .conftest import NAMES, run_of

SIZES = {"desktop": DESKTOP, "phone": PHONE}


def runs():
    """Three runs of which the second is best."""
    full = replace(run_of(), method="full fine-tuning", costs=Costs(20000, 20000, 90.0, None, 500.0, 100.0))
    better = replace(full, metrics={"mean_iou": Metric(0.25, 0.9)})
    return {"LoRA, r=8": run_of(), "full": better, "without val": replace(full, history={}, metrics={
        "mean_iou": Metric(None, None)
    })}  # fmt: skip


PAGES = {
    "masks": lambda masks, labels: render_report(run_of(), masks, "#808080"),
    "labels": lambda masks, labels: render_report(run_of(per_pixel=False), labels),
    "comparison": lambda masks, labels: render_comparison(runs(), ["The runs have different data."]),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with running_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(params=PAGES)
def text(request, masks, labels):
    return PAGES[request.param](masks, labels)


def test_a_page_asks_for_nothing_beside_it(text):
    assert "http" not in text
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)


def test_names_of_classes_are_text(text):
    assert "<b>bold</b>" not in text
    assert "Straße" in text


class Name(str):
    """A name that counts how often one is compared with another."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Name.compared += 1
        return super().__eq__(other)


def test_each_class_of_a_comparison_is_looked_up():
    results = tuple(ClassResult(Name(f"class {i}"), "#e69f00", None, i / 300, 0.5, 1, 1) for i in range(300))
    run = run_of(classes=results)
    assert "class 299" in render_comparison({"LoRA": run, "full": run})
    assert Name.compared < 3000


def test_of_classes_with_one_name_a_comparison_tells_the_first():
    """The first has the samples of a list."""
    first, other, absent = run_of().classes
    run = run_of(classes=(first, other, replace(absent, name=first.name)))
    text = render_comparison({"LoRA": run})
    assert re.findall(rf"<td>{first.name}</td><td[^>]*>([^<]*)<", text) == ["95.0%", "95.0%"]


def test_classes_that_are_all_alike_have_no_best_one(masks):
    alike = tuple(replace(result, after=0.5) for result in run_of().classes)
    text = render_report(run_of(classes=alike), masks, "#808080")
    assert "All are at 50.0%." in text
    assert "Best is" not in text


def hard(per_pixel, classes=100):
    """A run with many classes of long names, which ended after an epoch and has no finite loss."""
    names = [f"Streptopelia_decaocto_subspecies_{i}_(Eurasian collared dove, juvenile plumage)" for i in range(classes)]
    results = tuple(ClassResult(name, "#e69f00", None, i / classes, 0.5, 1, 1) for i, name in enumerate(names))
    matrix = tuple(tuple(int((i * j) % 7 == 1) for j in range(classes)) for i in range(classes))
    main = "mean_iou" if per_pixel else "accuracy"
    history = {f"val/{main}": ((0.0, 0.25), (1.0, None)), "val/loss": ((0.0, None), (1.0, None))}
    metrics = {main: Metric(0.25, None), "loss": Metric(None, None), "f1": Metric(0.5, None)}
    return run_of(
        per_pixel, classes=results, confusion=matrix, confused=((0, 1, 3), (1, 0, 3)), history=history, metrics=metrics,
        model="vit_base_patch16_clip_quickgelu_224.metaclip_2pt5b_and_a_name_that_has_no_end",
    )  # fmt: skip


def of_hard_sizes(examples):
    """Examples that are far from square."""
    shapes = ((40, 400), (400, 40), (50, 50))
    return [replace(each, width=w, height=h) for each, (w, h) in zip(examples, shapes, strict=False)]


HARD = {
    "masks": lambda masks, labels: render_report(hard(True), of_hard_sizes(masks), "#808080"),
    "labels": lambda masks, labels: render_report(hard(False), of_hard_sizes(labels)),
    "no examples": lambda masks, labels: render_report(hard(False, 2), []),
    "comparison": lambda masks, labels: render_comparison({"a " + "long_name_" * 9: hard(False), "b": hard(False)}),
}


class TestWhatIsNotThere:
    def test_a_metric_that_is_no_number_is_told_and_what_was_before_stays(self):
        text = render_report(hard(False, 2), [])
        assert "There is no Accuracy after training" in text
        assert "before training 25.0%" in text
        assert "Not measured before training" not in text
        assert "before 50.0%</div>" in text

    def test_a_chart_without_a_number_is_left_out(self):
        text = render_report(hard(False, 2), [])
        assert text.count("data-chart='") == 1
        assert "#curves" not in render_report(replace(hard(False, 2), history={}), [])

    def test_losses_of_a_run_that_diverged_are_no_numbers(self):
        """Of which one would keep the script of the page from reading any."""
        losses = {"loss": [(1, 0.5), (2, math.nan), (3, math.inf)], "class_loss": [(1, math.nan)]}
        text = render_samples(SampleRecord("model", "", {}, [], losses, {}))
        (chart,) = re.findall("data-chart='([^']+)'", text)
        assert json.loads(chart)["lines"][0]["points"] == [[1, 0.5], [2, None], [3, None]]

    def test_without_samples_there_is_no_section_of_them(self):
        assert 'id="examples"' not in render_report(run_of(), [])
        assert "#examples" not in render_report(run_of(), [])

    def test_a_sample_that_does_not_count_is_neither_right_nor_wrong(self, labels):
        text = render_report(run_of(per_pixel=False), [replace(labels[0], true_class=None)])
        assert "(not counted)" in text
        assert "✓" not in text

    def test_classes_that_the_key_leaves_out_are_counted(self, masks):
        assert "and 70 more, in the list of classes" in render_report(hard(True), masks)


@needs_browser
@pytest.mark.parametrize("kind", HARD)
def test_hard_pages_fit_the_window(kind, masks, labels, browser, tmp_path):
    (tmp_path / "page.html").write_text(HARD[kind](masks, labels))
    with browser.page() as page:
        for size in SIZES.values():
            page.resize(size)
            page.open((tmp_path / "page.html").as_uri())
            assert page.problems == []
            assert page.run("document.documentElement.scrollWidth <= innerWidth"), size
            tall = "[...document.querySelectorAll('.stack')].map(e => e.clientHeight).filter(h => h > 440)"
            assert page.run(tall) == []


@needs_browser
class TestInABrowser:
    @pytest.fixture
    def page(self, text, browser, tmp_path):
        (tmp_path / "page.html").write_text(text)
        with browser.page() as page:
            yield page

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
    def test_it_is_shown_without_a_problem(self, page, tmp_path, scheme, size):
        page.prefer(scheme)
        page.resize(size)
        page.open((tmp_path / "page.html").as_uri())
        assert page.problems == []
        assert [url for url in page.requests if not url.startswith(("data:", "file:"))] == []
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        (red, *_) = page.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (red < 60) == (scheme == "dark")
        other = {"light": "dark", "dark": "light"}[scheme]
        page.click("[data-theme-button]")
        assert page.run("getComputedStyle(document.documentElement).colorScheme") == other
        assert page.run("document.querySelector('[data-theme-button]').textContent").lower() == scheme

    def test_curves_are_drawn_over_whole_epochs(self, page, tmp_path):
        page.open((tmp_path / "page.html").as_uri())
        drawn = page.run("[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.curve').length)")
        assert drawn in ([2, 2], [2])  # train and val of loss and metric; two runs with val metrics
        ticks = page.run("[...document.querySelector('.plot').querySelectorAll('.x-tick')].map(t => t.textContent)")
        assert ticks == ["0", "1", "2"]
        x, y = page.middle(".plot svg")
        page.move(x, y)
        tip = page.run("document.querySelector('.tip').textContent").splitlines()
        assert tip[0] == "after 1 epoch"
        assert len(tip) == 3


@needs_browser
class TestMasks:
    @pytest.fixture
    def page(self, masks, browser, tmp_path):
        (tmp_path / "page.html").write_text(render_report(run_of(), masks, "#808080"))
        with browser.page() as page:
            page.open((tmp_path / "page.html").as_uri())
            yield page
            assert page.problems == []

    @pytest.mark.parametrize(
        ("value", "covered"),
        [(0, [0, 0]), (0.5, [50, 0]), (1, [100, 0]), (1.25, [75, 25]), (2, [0, 100])],
        ids=["image", "half way", "truth", "a quarter", "prediction"],
    )
    def test_the_slider_goes_from_image_to_truth_to_prediction(self, page, value, covered):
        page.run(
            f"(() => {{ const i = document.querySelector('.slide input'); i.value = {value};"
            " i.dispatchEvent(new Event('input')); })()"
        )
        clips = page.run(
            "[...document.querySelectorAll('.example .over-image')].slice(0, 2).map(e => e.style.clipPath)"
        )
        assert [round(100 - sum(sides(clip)[1::2])) for clip in clips] == covered

    @pytest.mark.parametrize("stop", [0, 1, 2], ids=["image", "truth", "prediction"])
    def test_the_stops_are_buttons(self, page, stop):
        page.click(f"[data-stop='{stop}']")
        assert page.run("document.querySelector('.slide input').value") == str(stop)
        assert page.run(f"document.querySelector('[data-stop=\"{stop}\"]').ariaPressed") == "true"

    def test_a_drag_over_the_picture_moves_the_edge(self, page):
        x, y = page.middle(".stack")
        width = page.run("document.querySelector('.stack').clientWidth")
        page.press(x, y)
        page.move(x + width / 4, y, pressed=True)
        page.press(x + width / 4, y, "mouseReleased")
        assert float(page.run("document.querySelector('.slide input').value")) == pytest.approx(1.75, abs=0.02)

    def test_the_filter_hides_what_does_not_show_the_class(self, page):
        shown = "[...document.querySelectorAll('.example')].filter(e => e.offsetParent).length"
        assert page.run(shown) == 3
        choose(page, "[data-filter]", "1")
        assert page.run(shown) == 2
        assert "2 of 3 samples" in page.run("document.querySelector('[data-shown]').textContent")
        choose(page, "[data-filter]", "")
        assert page.run(shown) == 3

    def test_the_worst_come_first_until_the_best_shall(self, page):
        names = "[...document.querySelectorAll('.example .name')].map(e => e.textContent)"
        assert page.run(names) == ["scene 0", "scene 1", "scene 2"]
        choose(page, "[data-order]", "best")
        assert page.run(names) == ["scene 2", "scene 1", "scene 0"]

    def test_classes_are_sorted(self, page):
        names = "[...document.querySelectorAll('.bar b')].map(e => e.textContent)"
        assert page.run(names) == NAMES
        choose(page, "[data-sort]", "after")
        assert page.run(names) == [NAMES[1], NAMES[0], NAMES[2]]

    def test_the_matrix_has_numbers_and_names(self, page):
        rows = page.run("[...document.querySelectorAll('.matrix tbody tr')].map(r => r.innerText.split('\\t'))")
        assert rows == [[NAMES[0], "95.0", "5.0", "0"], [NAMES[1], "30.0", "70.0", "0"], [NAMES[2], "0", "0", "0"]]
        page.move(*page.middle(".matrix td.miss"))
        assert page.run("document.querySelector('.tip').textContent").startswith(
            f"\u2068{NAMES[0]}\u2069 → \u2068{NAMES[1]}\u2069\n3 of 60"
        )

    def test_void_is_in_the_key(self, page):
        assert "void" in page.run("document.querySelector('.tools .keys').textContent")

    def test_a_command_is_copied_or_selected(self, page):
        page.click("[data-copy]")
        page.run("new Promise(done => setTimeout(done, 100))")
        assert page.run("document.querySelector('[data-copy]').textContent") in ("Copied", "Selected")


@needs_browser
def test_only_mistakes(labels, browser, tmp_path):
    (tmp_path / "page.html").write_text(render_report(run_of(per_pixel=False), labels))
    with browser.page() as page:
        page.open((tmp_path / "page.html").as_uri())
        page.click("[data-wrong]")
        verdicts = "[...document.querySelectorAll('.example')].filter(e => e.offsetParent).map(e => e.dataset.loss)"
        assert page.run(verdicts) == ["2.0"]
        assert page.problems == []


@needs_browser
def test_the_true_name_is_left_of_the_predicted_one_where_both_are_written_from_right_to_left(
    labels, browser, tmp_path
):
    classes = [replace(each, name=name) for each, name in zip(run_of().classes, ("שלום", "مرحبا", "x"), strict=True)]
    (tmp_path / "page.html").write_text(render_report(run_of(per_pixel=False, classes=tuple(classes)), labels), "utf-8")
    with browser.page() as page:
        page.open((tmp_path / "page.html").as_uri())
        places = (
            "[...document.querySelectorAll('.wrong bdi')].map(e => [e.textContent, e.getBoundingClientRect().left])"
        )
        (true, first), (guess, second) = page.run(places)
        assert (true, guess) == ("שלום", "مرحبا")
        assert first < second


def sides(clip):
    """The four sides of a `clip-path: inset(...)` in percent: top, right, bottom, left."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", clip)]
    top, right, bottom, left = (numbers * 4)[:4] if len(numbers) in (1, 2, 4) else (*numbers, numbers[1])
    return top, right, bottom, left


def choose(page, selector, value):
    page.run(
        f"(() => {{ const e = document.querySelector('{selector}'); e.value = '{value}';"
        " e.dispatchEvent(new Event('change')); })()"
    )
