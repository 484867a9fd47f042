"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (selector, within = document) => within.querySelector(selector);
  const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

  // Light and dark: as the system has it, until the button says otherwise.
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = one("[data-theme-button]");
  const isDark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const nameButton = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    nameButton();
  });
  system.addEventListener("change", nameButton);
  nameButton();

  // One tooltip for everything with `data-tip`, by pointer and by keyboard.
  const tip = one(".tip");
  const showTip = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - width - 8))}px`;
    tip.style.top = `${y + 18 + height > innerHeight ? Math.max(8, y - height - 12) : y + 18}px`;
  };
  const hideTip = () => { tip.hidden = true; };
  document.addEventListener("pointermove", (event) => {
    if (event.target.closest(".plot")) return;
    const owner = event.target.closest("[data-tip]");
    if (owner) showTip(owner.dataset.tip, event.clientX, event.clientY);
    else hideTip();
  });
  document.addEventListener("focusin", (event) => {
    const owner = event.target.closest("[data-tip]");
    if (!owner || !owner.matches(":focus-visible")) return;
    const box = owner.getBoundingClientRect();
    showTip(owner.dataset.tip, box.left, box.bottom - 10);
  });
  document.addEventListener("focusout", hideTip);
  document.addEventListener("scroll", hideTip, true);

  // Charts.
  const niceStep = (range, most, smallest) => {
    const rough = Math.max(range / most, 1e-12);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough * 0.999);
    return Math.max(step, smallest);
  };
  const ticks = (low, high, step) => {
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(i * step);
    return found;
  };
  const draw = (figure) => {
    const chart = JSON.parse(figure.dataset.chart);
    const plot = one(".plot", figure);
    const width = Math.max(240, plot.clientWidth);
    const height = 250;
    const written = (value, digits) => (chart.share ? `${(100 * value).toFixed(digits)}%` : Number(value.toPrecision(digits + 2)));
    const lines = chart.lines.map((line) => ({ ...line, points: line.points.filter((point) => point[1] !== null) }));
    const points = lines.flatMap((line) => line.points);
    if (!points.length) return;
    const xs = [...new Set(points.map((point) => point[0]))].sort((a, b) => a - b);
    const [x0, x1] = [xs[0], Math.max(xs[xs.length - 1], xs[0] + 1)];
    const [least, most] = [Math.min(...points.map((p) => p[1])), Math.max(...points.map((p) => p[1]))];
    const yStep = niceStep(most > least ? Math.max(most - least, Math.abs(most) * 0.02) : Math.max(Math.abs(most), 1e-9), 5, 0);
    const [y0, y1] = [Math.floor(least / yStep + 1e-9) * yStep, Math.ceil(most / yStep - 1e-9) * yStep];
    const yTop = y1 > y0 ? y1 : y0 + yStep;
    const yDigits = Math.max(0, Math.ceil(-Math.log10(yStep * (chart.share ? 100 : 1)) - 1e-9));
    const yLabel = (value) => (chart.share ? `${(100 * value).toFixed(yDigits)}%` : value.toFixed(yDigits));
    const left = 12 + 7 * Math.max(...ticks(y0, yTop, yStep).map((v) => yLabel(v).length));
    const [right, top, bottom] = [width - 10, 8, height - 40];
    const px = (x) => left + ((x - x0) / (x1 - x0)) * (right - left);
    const py = (y) => bottom - ((y - y0) / (yTop - y0)) * (bottom - top);
    const xStep = niceStep(x1 - x0, Math.max(2, Math.floor((right - left) / 48)), 1);
    const parts = [];
    for (const y of ticks(y0, yTop, yStep)) {
      parts.push(`<line class="grid" x1="${left}" x2="${right}" y1="${py(y)}" y2="${py(y)}"/>`);
      parts.push(`<text x="${left - 8}" y="${py(y) + 4}" text-anchor="end">${yLabel(y)}</text>`);
    }
    for (const x of ticks(x0, x1, xStep)) {
      parts.push(`<text class="x-tick" x="${px(x)}" y="${bottom + 18}" text-anchor="middle">${x}</text>`);
    }
    parts.push(`<text x="${(left + right) / 2}" y="${height - 4}" text-anchor="middle">epochs of training</text>`);
    for (const line of lines) {
      const path = line.points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" ");
      const dashed = line.dashed ? ' stroke-dasharray="6 4"' : "";
      parts.push(`<polyline class="curve" points="${path}" stroke="var(--line-${line.color})"${dashed}/>`);
      if (line.points.length <= 40) {
        for (const [x, y] of line.points) parts.push(`<circle cx="${px(x)}" cy="${py(y)}" r="2.6" fill="var(--line-${line.color})"/>`);
      }
    }
    parts.push(`<line class="guide" y1="${top}" y2="${bottom}" visibility="hidden"/>`);
    const last = lines.filter((line) => line.points.length).map((line) => `${line.name} ${written(line.points[line.points.length - 1][1], 1)}`);
    const summary = `${chart.title} over the epochs; at the end ${last.join(", ")}`;
    plot.innerHTML = `<svg role="img" tabindex="0" viewBox="0 0 ${width} ${height}" aria-label="${escaped(summary)}">${parts.join("")}</svg>`;
    const svg = one("svg", plot);
    const guide = one(".guide", plot);
    let current = xs.length - 1;
    const point = (index) => {
      current = index;
      const x = xs[index];
      guide.setAttribute("x1", px(x));
      guide.setAttribute("x2", px(x));
      guide.setAttribute("visibility", "visible");
      const values = lines.flatMap((line) => line.points.filter((p) => p[0] === x).map((p) => `${line.name}  ${written(p[1], 2)}`));
      const box = svg.getBoundingClientRect();
      const at = Number.isInteger(x) ? x : x.toFixed(2);
      const heading = x === 0 ? "before training" : `after ${at} ${x === 1 ? "epoch" : "epochs"}`;
      showTip([heading, ...values].join("\n"), box.left + (px(x) * box.width) / width, box.top + 40);
    };
    const leave = () => { guide.setAttribute("visibility", "hidden"); hideTip(); };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) * width) / box.width;
      point(xs.reduce((best, each, index) => (Math.abs(px(each) - x) < Math.abs(px(xs[best]) - x) ? index : best), 0));
    });
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      point(Math.max(0, Math.min(xs.length - 1, current + step)));
    });
  };
  const charts = all("[data-chart]");
  const redraw = new ResizeObserver((entries) => entries.forEach((entry) => draw(entry.target)));
  charts.forEach((figure) => { draw(figure); redraw.observe(figure); });

  // Classes in another order.
  const sort = one("[data-sort]");
  if (sort) {
    const bars = one(".bars");
    sort.addEventListener("change", () => {
      const key = (bar) => Number(bar.dataset[sort.value]);
      all(".bar", bars).sort((a, b) => key(a) - key(b) || a.dataset.index - b.dataset.index).forEach((bar) => bars.append(bar));
    });
  }

  // Examples: from the image (0) to the truth (1) to the prediction (2).
  for (const stack of all("[data-stack]")) {
    const input = one("input", stack.parentElement);
    const stops = all("[data-stop]", stack.parentElement);
    const show = () => {
      const value = Number(input.value);
      const share = value > 1 ? value - 1 : value;
      const edge = 100 * share;
      const fromLeft = `inset(0 ${100 - edge}% 0 0)`;
      one(".prediction", stack).style.clipPath = value > 1 ? fromLeft : "inset(0 100% 0 0)";
      one(".truth", stack).style.clipPath = value > 1 ? `inset(0 0 0 ${edge}%)` : fromLeft;
      const divided = share > 0 && share < 1;
      one(".divider", stack).style.left = `${edge}%`;
      one(".divider", stack).hidden = !divided;
      const [left, right] = value > 1 ? ["prediction", "truth"] : ["truth", "image"];
      one(".left", stack).textContent = left;
      one(".left", stack).hidden = share === 0;
      one(".right", stack).textContent = right;
      one(".right", stack).hidden = share === 1 && value !== 0;
      stops.forEach((stop) => stop.setAttribute("aria-pressed", String(Number(stop.dataset.stop) === value)));
    };
    const set = (value) => { input.value = value; show(); };
    input.addEventListener("input", show);
    stops.forEach((stop) => stop.addEventListener("click", () => set(stop.dataset.stop)));
    const drag = (event) => {
      if (event.type === "pointermove" && !event.buttons) return;
      const box = stack.getBoundingClientRect();
      set(1 + Math.max(0.001, Math.min(0.999, (event.clientX - box.left) / box.width)));
    };
    stack.addEventListener("pointerdown", (event) => { stack.setPointerCapture(event.pointerId); drag(event); });
    stack.addEventListener("pointermove", drag);
    show();
  }
  const opacity = one("[data-opacity]");
  if (opacity) {
    const fade = () => one(".gallery").style.setProperty("--opacity", opacity.value);
    opacity.addEventListener("input", fade);
    fade();
  }

  // Which examples are shown, and in which order.
  const gallery = one(".gallery");
  if (gallery) {
    const [filter, order, wrong] = [one("[data-filter]"), one("[data-order]"), one("[data-wrong]")];
    const cards = all(".example", gallery);
    const apply = () => {
      for (const card of cards) {
        const shows = !filter.value || card.dataset.classes.split(" ").includes(filter.value);
        card.hidden = !shows || Boolean(wrong && wrong.checked && !("mistake" in card.dataset));
      }
      const shown = cards.filter((card) => !card.hidden).length;
      one("[data-shown]").textContent = shown === cards.length ? `${shown} samples.` : `${shown} of ${cards.length} samples.`;
    };
    const arrange = () => {
      const sign = order.value === "best" ? 1 : -1;
      [...cards].sort((a, b) => sign * (a.dataset.loss - b.dataset.loss)).forEach((card) => gallery.append(card));
    };
    filter.addEventListener("change", apply);
    order.addEventListener("change", arrange);
    if (wrong) wrong.addEventListener("change", apply);
    apply();
  }

  // Commands to copy.
  for (const copy of all("[data-copy]")) {
    const source = one("pre", copy.parentElement);
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(source.textContent);
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(source);
        copy.textContent = "Selected";
      }
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
  }
})();
