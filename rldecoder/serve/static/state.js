"use strict";
// What is looked at stands in the address, behind the #, which no server is ever sent: reloading
// and sharing it show the same.
const State = (() => {
  const KEYS = ["view", "prompt", "at", "target", "minus", "where", "change", "order", "steer", "start",
    "new", "temperature", "seed", "other", "otherat", "feature", "words", "sort", "only"];
  let written = "";
  let values = {};
  const BURST = 40;
  const REFILL_MS = 150;
  let spare = BURST;
  let noted = 0;
  let waiting = 0;
  const watchers = [];

  const parse = () => {
    const found = new URLSearchParams(location.hash.slice(1));
    return Object.fromEntries(KEYS.filter((key) => found.has(key)).map((key) => [key, found.get(key)]));
  };
  const address = () => {
    const params = new URLSearchParams(KEYS.filter((key) => values[key]).map((key) => [key, values[key]]));
    return params.size ? "#" + params : location.pathname;
  };
  // `adopted`: the values came from the address, not from the page.
  const tell = (adopted) => watchers.forEach((watcher) => watcher(adopted));

  // Arrow keys held down: browsers refuse hundreds of addresses in seconds, so after a burst some
  // wait. All others are written at once: one that waits while the page is reloaded is lost.
  const refill = () => {
    const now = performance.now();
    spare = Math.min(BURST, spare + (now - noted) / REFILL_MS);
    noted = now;
  };
  const note = () => {
    waiting = 0;
    refill();
    spare -= 1;
    history.replaceState(null, "", written);
  };
  const flush = () => {
    if (!waiting) return;
    clearTimeout(waiting);
    note();
  };

  // Changes some values; null takes one out. `step`: the browser's Back takes it back.
  const set = (changes, step) => {
    for (const [key, value] of Object.entries(changes)) {
      if (value === null || value === undefined || value === "") delete values[key];
      else values[key] = String(value);
    }
    const next = address();
    if (next === written) return;
    if (step) flush();
    written = next;
    if (step) {
      history.pushState(null, "", next);
      tell(false);
      return;
    }
    if (waiting) return;
    refill();
    if (spare >= 1) note();
    else waiting = setTimeout(note, REFILL_MS);
  };
  const adopt = () => {
    clearTimeout(waiting);
    waiting = 0;
    values = parse();
    written = address();
    tell(true);
  };
  addEventListener("popstate", adopt);
  addEventListener("pagehide", flush);
  const whole = (key, fallback) => (/^\d{1,10}$/.test(values[key] || "") ? Number(values[key]) : fallback);
  return { set, adopt, watch: (watcher) => watchers.push(watcher), get: (key) => values[key] || "", whole };
})();
