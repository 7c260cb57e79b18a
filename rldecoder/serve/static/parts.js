"use strict";
// Tables, token strips and numbers, as all views show them.
const Parts = (() => {
  const { element, button, showFeature } = Bench;
  const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : (100 * p).toFixed(1)) + " %";
  const signed = (value, digits) => (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(digits);
  const nats = (value) => signed(value, 2);
  const token = (text) => element("span", "tok", text);

  // Narrow windows show a table of the class `cells` as cards: every cell knows the name of its
  // column. Roles are said because styles that turn rows into blocks take them away.
  const table = (className, names, rows) => {
    const box = element("table", className);
    box.setAttribute("role", "table");
    const head = box.createTHead();
    head.setAttribute("role", "rowgroup");
    const top = head.insertRow();
    top.setAttribute("role", "row");
    names.forEach((name) => {
      const cell = element("th", name.num ? "num" : "", name.text);
      cell.scope = "col";
      cell.setAttribute("role", "columnheader");
      top.append(cell);
    });
    const body = box.createTBody();
    body.setAttribute("role", "rowgroup");
    fill(body, names, rows);
    return box;
  };
  const fill = (body, names, rows) => {
    body.replaceChildren(...rows.map((cells) => {
      const row = element("tr");
      row.setAttribute("role", "row");
      cells.forEach((content, place) => {
        const cell = element("td", names[place].num ? "num" : "");
        cell.setAttribute("role", "cell");
        cell.dataset.name = names[place].text;
        cell.append(content);
        row.append(cell);
      });
      return row;
    }));
  };
  const moved = (text, change, least) => element("span", change > least ? "up" : change < -least ? "down" : "", text);

  const shifts = (title, change, before, after) => table("change-table",
    [{ text: title }, { text: before, num: true }, { text: after, num: true }],
    change.shifts.map((shift) => [token(shift.token), percent(shift.before),
      moved(percent(shift.after), shift.after - shift.before, 0)]));

  // A label below the bar of confidence is shown as a guess; without one stands what is known.
  const labelText = (feature) => feature.label || (feature.unsure_label ? "unsure: " + feature.unsure_label : feature.description);
  const named = (feature) => {
    const box = element("span", "named");
    const open = button("#" + feature.latent, () => showFeature(feature.latent), "feature-name", "feature " + feature.latent + ", its page");
    box.append(open, element("span", "label-text" + (feature.label ? "" : " none"), labelText(feature)));
    return box;
  };

  // A window of text: the colour is the activation, the underline marks the strongest token.
  const KINDS = { quantile: "weaker: ", near_miss: "silent here: " };
  const context = (window) => {
    const row = element("p", "context");
    if (KINDS[window.kind]) row.append(element("em", "", KINDS[window.kind]));
    window.tokens.forEach((text, place) => {
      const span = element("span", place === window.focus ? "focus" : "", text);
      span.style.setProperty("--h", String(window.heat[place]));
      row.append(span);
    });
    return row;
  };

  // Tokens to choose from, by mouse or arrow keys.
  const strip = (box, texts, chosen) => {
    let place = -1;
    const select = (next, quiet) => {
      if (box.children[place]) {
        box.children[place].setAttribute("aria-selected", "false");
        box.children[place].tabIndex = -1;
      }
      place = next;
      const node = box.children[place];
      node.setAttribute("aria-selected", "true");
      node.tabIndex = 0;
      // Only the strip scrolls: the page stays where the reader is.
      if (node.offsetTop < box.scrollTop || node.offsetTop + node.offsetHeight > box.scrollTop + box.clientHeight) {
        box.scrollTop = node.offsetTop - box.clientHeight / 2;
      }
      if (!quiet) chosen(place);
    };
    box.replaceChildren(...texts.map((text, number) => {
      const node = element("span", "", text);
      node.setAttribute("role", "option");
      node.setAttribute("aria-selected", "false");
      node.tabIndex = -1;
      node.addEventListener("click", () => select(number));
      return node;
    }));
    box.onkeydown = (event) => {
      const last = texts.length - 1;
      const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: last }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      const bounded = Math.min(Math.max(next, 0), last);
      if (bounded !== place) select(bounded);
      box.children[bounded].focus();
    };
    return { select };
  };
  return { percent, signed, nats, token, table, fill, moved, shifts, named, labelText, context, strip };
})();
