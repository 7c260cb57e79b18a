"use strict";
// One feature at one token, scaled: what both models predict before and after.
const Intervene = (() => {
  const { at, element, ask, complain } = Bench;
  const body = at("change-body");
  const hint = "Take a feature out, or amplify it, in the list below. Both models are run again.";
  let last = 0;

  const reset = () => {
    last += 1;
    body.replaceChildren(element("p", "note", hint));
  };

  const rows = (change) => change.shifts.map((shift) => {
    const row = element("tr");
    const cell = element("td");
    cell.append(element("span", "tok", shift.token));
    const moved = shift.after > shift.before ? " up" : shift.after < shift.before ? " down" : "";
    row.append(cell, element("td", "num", Trace.percent(shift.before)), element("td", "num" + moved, Trace.percent(shift.after)));
    return row;
  });
  const table = (title, change) => {
    const box = element("div");
    const found = element("table", "change-table");
    const head = element("thead");
    const names = element("tr");
    [title, "before", "after"].forEach((text, place) => {
      const cell = element("th", place ? "num" : "", text);
      cell.scope = "col";
      names.append(cell);
    });
    head.append(names);
    const rest = element("tbody");
    rest.append(...rows(change));
    found.append(head, rest);
    box.append(found, element("p", "note", "log p of “" + change.shifts[0].token + "” " + Trace.nats(-change.effect) + " nats, moved by KL " + change.moved[0].toFixed(3)));
    return box;
  };

  const laterWords = ({ frozen, decoder }) => {
    const most = (moved) => Math.max(...moved.slice(1)).toFixed(3);
    return "The frozen model’s later predictions move by up to " + most(frozen.moved) + " nats (coloured above)"
      // A decoder with blocks looks back; the server leaves later positions out for one without.
      + (decoder.moved.length > 1
        ? ", the decoder’s by up to " + most(decoder.moved) + " nats."
        : ". The linear decoder reads one token, so that its later ones stay.");
  };

  const run = async (feature, factor) => {
    const { prompt, position } = Trace.state;
    const mine = last += 1;
    if (!(factor >= 0 && factor <= 10)) {
      complain(new Error("Amplify by a number from 0 to 10."));
      at("factor").focus();
      return;
    }
    body.replaceChildren(element("p", "note", "running both models again …"));
    try {
      const found = await ask("/api/intervene", { prompt, position, latent: feature.latent, factor });
      if (mine !== last) return;
      const title = element("p", "");
      title.append("#" + feature.latent + (feature.label ? " “" + feature.label + "”" : "") + ": activation "
        + found.act.toFixed(2) + " → " + found.new_act.toFixed(2) + " at token " + position);
      const both = element("div", "pair wide");
      both.append(table("frozen model", found.frozen), table("decoder", found.decoder));
      const undo = element("button", "", "Back to unchanged");
      undo.type = "button";
      undo.addEventListener("click", () => { reset(); Trace.paintDistance(); });
      const parts = [title, both];
      if (found.frozen.moved.length > 1) parts.push(element("p", "note", laterWords(found)));
      body.replaceChildren(...parts, undo);
      Trace.paint(found.frozen.moved, "colour: how far the frozen model’s prediction moved, KL", position);
    } catch (error) {
      reset();
      complain(error);
    }
  };
  return { run, reset };
})();
