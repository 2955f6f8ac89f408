"use strict";
// Without this script the page says the same; with it, commands copy and the table folds, sorts and searches.
(() => {
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Commands. A frame without clipboard access still copies by a selection.
  const copy = async (text, code) => {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      const range = document.createRange();
      range.selectNodeContents(code);
      const selection = getSelection();
      selection.removeAllRanges();
      selection.addRange(range);
      return document.execCommand("copy");
    }
  };
  for (const button of all("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const code = one("code", button.parentElement);
      button.textContent = (await copy(code.textContent, code)) ? "Copied" : "Selected";
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
  }

  // A link to a place inside something folded unfolds it first.
  const table = one("#table");
  const setOpen = (body, open) => {
    body.toggleAttribute("data-closed", !open);
    const button = one(".part button", body);
    if (button) button.setAttribute("aria-expanded", String(open));
  };
  const reveal = (id) => {
    const target = id && document.getElementById(id);
    if (!target) return;
    for (let node = target.parentElement; node; node = node.parentElement) {
      if (node.tagName === "DETAILS") node.open = true;
      if (node.tagName === "TBODY" && table && table.contains(node)) setOpen(node, true);
    }
    target.scrollIntoView({ block: target.tagName === "TR" ? "center" : "start" });
  };
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (link) setTimeout(() => reveal(link.getAttribute("href").slice(1)));
  });
  reveal(location.hash.slice(1));
  if (!table) return;

  // The table: the model's order folds by part of the network, any other order is one flat list.
  const parts = all("tbody", table);
  const rows = all("tbody tr[id]", table);
  const home = new Map(rows.map((row) => [row, row.parentElement]));
  const headings = all("thead th", table);
  const flat = document.createElement("tbody");
  const find = one("#find"), only = one("#only"), fold = one("#fold"), shown = one("#shown");
  const searchable = new Map(rows.map((row) => [row, (row.cells[0].textContent + " " + row.cells[12].textContent).toLowerCase()]));
  const worst = { fail: 0, inconclusive: 1, warn: 2, pass: 3, skipped: 4 };
  let column = 0, direction = 1;

  const folded = () => parts.filter((body) => body.hasAttribute("data-closed")).length;
  const nameFold = () => { fold.textContent = folded() ? "Unfold all" : "Fold all"; };
  for (const body of parts) {
    setOpen(body, !body.hasAttribute("data-folded"));
    one(".part button", body).addEventListener("click", () => {
      setOpen(body, body.hasAttribute("data-closed"));
      nameFold();
    });
  }
  fold.addEventListener("click", () => {
    const open = folded() > 0;
    for (const body of parts) setOpen(body, open);
    nameFold();
  });

  const filter = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = only.value;
    const alive = new Map();
    let count = 0;
    for (const row of rows) {
      const outcome = row.dataset.o;
      const right = !wanted || outcome === wanted || (wanted === "finding" && worst[outcome] < 3);
      const match = right && words.every((word) => searchable.get(row).includes(word));
      row.hidden = !match;
      if (match) {
        count += 1;
        alive.set(home.get(row), true);
      }
    }
    const narrowed = words.length > 0 || wanted;
    for (const body of parts) {
      body.hidden = flat.isConnected || !alive.has(body);
      if (narrowed && alive.has(body)) setOpen(body, true);
    }
    shown.textContent = count === rows.length ? "" : `${count.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
    nameFold();
  };
  find.addEventListener("input", filter);
  only.addEventListener("change", filter);

  const value = (row) => {
    const cell = row.cells[column], text = cell.textContent.trim();
    if (column >= 1 && column <= 3) return worst[text] ?? null;
    if (column === 12) return text === "–" ? null : text;
    if (text === "infinite") return Infinity;
    const parsed = parseFloat(text.replaceAll(",", ""));
    return Number.isNaN(parsed) ? null : parsed;
  };
  const place = () => {
    headings.forEach((heading, index) => {
      if (index === column) heading.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else heading.removeAttribute("aria-sort");
    });
    if (column === 0 && direction > 0) {
      for (const row of rows) home.get(row).append(row);
      flat.remove();
    } else {
      const keyed = rows.map((row, index) => [column === 0 ? index : value(row), index, row]);
      keyed.sort(([a, i], [b, j]) => {
        if (a === b) return i - j;
        if (a === null || b === null) return a === null ? 1 : -1;
        return (a < b ? -1 : 1) * direction;
      });
      flat.append(...keyed.map(([, , row]) => row));
      table.append(flat);
    }
    fold.hidden = flat.isConnected;
    filter();
  };
  headings.forEach((heading, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    if (index === 0) button.title = "Forward order";
    button.addEventListener("click", () => {
      // Numbers start with the largest, outcomes with the worst.
      direction = index === column ? -direction : index >= 4 && index <= 11 ? -1 : 1;
      column = index;
      place();
    });
  });
  one(".tools").hidden = false;
  filter();

  // The picture: a cursor by pointer or arrow keys reads a tensor out; a click or Enter shows its line.
  const svg = one("#picture-svg"), readout = one("#readout");
  if (!svg) return;
  const cursor = one(".cursor", svg), names = headings.map((heading) => heading.textContent);
  const left = Number(svg.dataset.left), span = Number(svg.dataset.span), total = Number(svg.dataset.count);
  const shape = cursor.getAttribute("d").slice(cursor.getAttribute("d").indexOf(" "));
  let at = -1;
  const point = (index) => {
    at = Math.min(Math.max(index, 0), total - 1);
    const cells = document.getElementById(`p${at}`).cells;
    const text = (i) => cells[i].textContent.trim();
    const said = [1, 2, 4, 5, 6, 8].filter((i) => text(i) !== "–").map((i) => `${names[i].toLowerCase()} ${text(i)}`);
    readout.textContent = [text(0), ...said].join(" · ");
    cursor.setAttribute("d", `M${(left + (at + 0.5) * span / total).toFixed(1)}${shape}`);
    cursor.setAttribute("visibility", "visible");
  };
  const show = () => {
    if (at < 0) return;
    find.value = only.value = "";
    filter();
    reveal(`p${at}`);
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    point(Math.floor(((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width - left) / span * total));
  });
  svg.addEventListener("click", show);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10, Home: -total, End: total }[event.key];
    if (step) point(at + step);
    else if (event.key === "Enter") show();
    else return;
    event.preventDefault();
  });
})();
