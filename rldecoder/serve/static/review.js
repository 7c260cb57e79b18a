"use strict";
// The review queue: one label at a time, verdicts by button or key.
(() => {
  const { at, element, ask, get, complain, whenOpened, isOpen, typing } = Bench;
  const state = { cards: [], place: 0, skipped: new Set(), busy: false };

  const current = () => state.cards[state.place];
  const draw = () => {
    const feature = current();
    const box = at("review-card");
    box.replaceChildren(feature ? Features.card(feature)
      : element("p", "panel note", "Nothing waits: every label has a verdict, or was skipped."));
    ["accept", "reject"].forEach((id) => { at(id).disabled = !feature || feature.label === null; });
    ["skip", "relabel"].forEach((id) => { at(id).disabled = !feature; });
    at("back").disabled = state.place === 0;
    at("better").value = "";
    at("remark").value = "";
  };
  const refill = async () => {
    const found = await get("/api/queue?count=" + Math.min(10 + state.cards.length, 5000));
    const known = new Set(state.cards.map((card) => card.latent));
    state.cards.push(...found.cards.filter((card) => !known.has(card.latent) && !state.skipped.has(card.latent)));
    at("progress").textContent = found.reviewed + " of " + found.all + " labels have a verdict; the most important uncertain ones come first.";
  };
  const next = async () => {
    state.place += 1;
    if (!current()) await refill();
    draw();
    at("review-card").focus();
  };
  const give = async (verdict) => {
    const feature = current();
    if (!feature || state.busy) return;
    const reviewer = at("reviewer").value.trim();
    if (!reviewer) {
      complain(new Error("Say who you are first: the name is kept with the verdict."));
      at("reviewer").focus();
      return;
    }
    state.busy = true;
    try {
      const kept = await ask("/api/reviews", { latent: feature.latent, reviewer, note: at("remark").value, ...verdict });
      feature.reviews = [...(feature.reviews || []), kept];
      at("given").prepend(element("li", "", "#" + feature.latent + ": " + Cards.reviewText(kept)));
      await refill();
      await next();
    } catch (error) { complain(error); } finally { state.busy = false; }
  };
  const skip = async () => {
    if (!current()) return;
    state.skipped.add(current().latent);
    try { await next(); } catch (error) { complain(error); }
  };
  const back = () => {
    if (!state.place) return;
    state.place -= 1;
    draw();
    at("review-card").focus();
  };

  at("accept").addEventListener("click", () => give({ accept: true }));
  at("reject").addEventListener("click", () => give({ accept: false }));
  at("skip").addEventListener("click", skip);
  at("back").addEventListener("click", back);
  at("verdict").addEventListener("submit", (event) => {
    event.preventDefault();
    const label = at("better").value.trim();
    if (document.activeElement === at("reviewer")) { at("review-card").focus(); return; }
    if (label) give({ label });
    else { complain(new Error("Write the better label first.")); at("better").focus(); }
  });
  const keys = {
    a: () => at("accept").click(), r: () => at("reject").click(), s: () => at("skip").click(),
    b: () => at("back").click(), l: () => at("better").focus(), n: () => at("remark").focus(),
  };
  document.addEventListener("keydown", (event) => {
    if (!isOpen("review") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && typing()) { at("review-card").focus(); return; }
    if (typing() || !at("shortcuts").checked) return;
    const action = keys[event.key.toLowerCase()];
    if (action) { event.preventDefault(); action(); }
  });
  whenOpened("review", async () => {
    if (current()) return;
    try { await refill(); draw(); } catch (error) { complain(error); }
  });
})();
