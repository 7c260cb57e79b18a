"use strict";
// A list of features and what becomes of each: scaled, set, or held between two values. In the
// address: 12x3 scales, 12=4 sets, 12~1~2 holds (12~1~ without an upper end).
const Changes = (() => {
  const { element, button, get, complain, showFeature } = Bench;
  const HOW = [["scale", "× factor"], ["set", "set to"], ["clamp", "hold between"]];
  const NUMBER = "-?\\d{1,22}(?:\\.\\d{1,25})?(?:e[-+]?\\d{1,3})?";  // all that String() makes
  const FORM = new RegExp("^(\\d{1,9})(?:x(" + NUMBER + ")|=(" + NUMBER + ")|~(" + NUMBER + ")~(" + NUMBER + ")?)$");

  const write = (list) => list.map((one) => one.latent + (
    one.how === "scale" ? "x" + one.value : one.how === "set" ? "=" + one.value
      : "~" + one.value + "~" + (one.high === null ? "" : one.high))).join(";");
  const parse = (text) => text.split(";").map((part) => FORM.exec(part)).filter(Boolean).slice(0, 24).map((found) => {
    const latent = Number(found[1]);
    if (found[2] !== undefined) return { latent, how: "scale", value: Number(found[2]), high: null };
    if (found[3] !== undefined) return { latent, how: "set", value: Number(found[3]), high: null };
    return { latent, how: "clamp", value: Number(found[4]), high: found[5] === undefined ? null : Number(found[5]) };
  });
  const words = (one) => "#" + one.latent + (one.how === "scale" ? " × " + one.value
    : one.how === "set" ? " set to " + one.value
      : " held between " + one.value + " and " + (one.high === null ? "any" : one.high));

  const names = new Map();
  // Names of features that came by number, from an address.
  const nameOf = async (latent) => {
    if (!names.has(latent)) {
      const found = await get("/api/find?" + new URLSearchParams({ words: "#" + latent }));
      names.set(latent, (found.found[0].is_label && !found.found[0].sure ? "unsure: " : "") + found.found[0].shown);
    }
    return names.get(latent);
  };

  // An editor in `box`; `changed` is told after each change of the list.
  const editor = (box, id, changed) => {
    let list = [];
    const rows = element("ul", "changes");
    rows.setAttribute("aria-label", "Changed features");
    const search = element("input", "");
    search.type = "search";
    search.id = id + "-add";
    search.maxLength = 200;
    search.placeholder = "a word of a label, a token, or #latent";
    const label = element("label", "", "Add any feature, active or not");
    label.htmlFor = search.id;
    const results = element("ul", "results");
    results.setAttribute("aria-label", "Features found");
    const state = element("p", "note");
    state.setAttribute("role", "status");
    box.replaceChildren(rows, label, search, state, results);

    const field = (one, key, name) => {
      const input = element("input", "number");
      input.type = "number";
      input.step = "any";
      input.value = one[key] === null ? "" : String(one[key]);
      if (key === "high") input.placeholder = "any";
      input.setAttribute("aria-label", name + " of feature " + one.latent);
      input.addEventListener("change", () => {
        const text = input.value.trim();
        if (key === "high" && !text) one.high = null;
        else if (text && Number.isFinite(Number(text))) one[key] = Number(text);
        else { complain(new Error("Give a number for feature " + one.latent + ".")); input.focus(); return; }
        changed();
      });
      return input;
    };
    const row = (one) => {
      const item = element("li");
      const name = element("span", "named");
      const text = element("span", "label-text", names.get(one.latent) || "");
      name.append(button("#" + one.latent, () => showFeature(one.latent), "feature-name", "feature " + one.latent + ", its page"), text);
      nameOf(one.latent).then((said) => { text.textContent = said; }, complain);
      const how = element("select");
      how.setAttribute("aria-label", "how feature " + one.latent + " is changed");
      HOW.forEach(([value, said]) => how.append(new Option(said, value, false, value === one.how)));
      how.addEventListener("change", () => { one.how = how.value; one.high = null; if (one.how !== "scale") one.value = Math.max(one.value, 0); draw(); changed(); });
      const values = element("span", "values");
      values.append(how, field(one, "value", one.how === "scale" ? "factor" : one.how === "set" ? "activation" : "least activation"));
      if (one.how === "clamp") values.append(element("span", "note", "and"), field(one, "high", "greatest activation"));
      values.append(button("remove", () => { list = list.filter((other) => other !== one); draw(); changed(); search.focus(); }, "", "remove feature " + one.latent));
      item.append(name, values);
      return item;
    };
    const draw = () => {
      rows.replaceChildren(...(list.length ? list.map(row) : [element("li", "note", "No feature is changed yet.")]));
    };
    const put = (one) => {
      const place = list.findIndex((other) => other.latent === one.latent);
      if (place < 0) list.push(one);
      else list[place] = one;
      draw();
      changed();
    };

    let waiting = 0;
    let abort = new AbortController();
    const find = async () => {
      abort.abort();
      abort = new AbortController();
      results.replaceChildren();
      state.textContent = "";
      if (!search.value.trim()) return;
      try {
        const found = await get("/api/find?" + new URLSearchParams({ words: search.value }), abort.signal);
        state.textContent = found.found.length ? (found.more ? found.more + " more: add a word" : "") : "Nothing is found.";
        results.replaceChildren(...found.found.map((one) => {
          const item = element("li");
          const said = (one.is_label && !one.sure ? "unsure: " : "") + one.shown;
          names.set(one.latent, said);
          const add = button("", () => {
            search.value = "";
            results.replaceChildren();
            state.textContent = "";
            // Its usual high: what it is where it is clearly active.
            put({ latent: one.latent, how: "set", value: Number((one.usual || 1).toPrecision(3)), high: null });
            search.focus();
          }, "", "add feature " + one.latent);
          add.append(element("b", "", "#" + one.latent), " ", said);
          item.append(add);
          return item;
        }));
      } catch (error) { complain(error); }
    };
    search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(find, 150); });
    search.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      const first = results.querySelector("button");
      if (first) first.click();
    });
    draw();
    return {
      get list() { return list; },
      put,
      know: (latent, said) => names.set(latent, said),
      read: (text) => { list = parse(text); draw(); },
      clear: () => { list = []; draw(); },
      text: () => write(list),
    };
  };
  return { editor, words };
})();
