"use strict";
// What is seen, taken along: as JSON, CSV, PNG, or as Python with the library. A view tells its
// sheet: { name, title, facts: [text], tokens: [{ text, heat }], blocks: [{ title, text }],
// tables: [{ name, columns: [text], rows: [[value]] }], question, answers, code }.
const Sheet = (() => {
  const { element, button, complain } = Bench;
  const { signed } = Parts;

  const save = (name, type, content) => {
    const link = element("a");
    link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };

  const json = (sheet) => JSON.stringify(
    { shown: sheet.title, question: sheet.question, answers: sheet.answers, python: sheet.code }, null, 1) + "\n";

  // One table for all: a row says which it is of, and leaves the columns of others empty.
  const csv = (sheet) => {
    const columns = [...new Set(sheet.tables.flatMap((table) => table.columns))];
    const cell = (value) => {
      if (value === null || value === undefined) return "";
      if (typeof value === "number") return String(value);
      // Spreadsheets would run a text that begins like a formula; a number is none.
      const formula = /^[=+\-@\t\r\n＝＋－＠]/.test(value) && !/^-?\d+(\.\d+)?(e[-+]\d+)?$/.test(value);
      const text = formula ? "'" + value : value;
      return /[",\n\r]/.test(text) ? "\"" + text.replaceAll("\"", "\"\"") + "\"" : text;
    };
    const lines = [["table", ...columns]];
    sheet.tables.forEach((table) => table.rows.forEach((row) => lines.push(
      [table.name, ...columns.map((column) => row[table.columns.indexOf(column)])])));
    return lines.map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n";
  };

  // The picture, drawn line by line: what is too wide is wrapped.
  const WIDTH = 1100;
  const MARGIN = 36;
  const shown = (value) => (value === null || value === undefined ? "–"
    : typeof value === "number" ? (Number.isInteger(value) ? String(value) : signed(value, 3).replace("+", "")) : value);
  const picture = (sheet) => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const canvas = element("canvas");
    let pen = canvas.getContext("2d");
    const sans = (size, weight) => (weight || 400) + " " + size + "px " + colour("--sans");
    const mono = (size) => size + "px " + colour("--mono");
    let y = 0;

    const wrap = (text, width) => {
      const lines = [];
      let line = "";
      for (const word of text.split(/(?<=[\s,;↵])/)) {
        if (line && pen.measureText(line + word).width > width) { lines.push(line); line = ""; }
        line += word;
        while (pen.measureText(line).width > width) {
          let end = line.length;
          while (end > 1 && pen.measureText(line.slice(0, end)).width > width) end -= 1;
          lines.push(line.slice(0, end));
          line = line.slice(end);
        }
      }
      lines.push(line);
      return lines;
    };
    const write = (text, font, ink, height, x = MARGIN, width = WIDTH - 2 * MARGIN) => {
      pen.font = font;
      pen.fillStyle = colour(ink);
      wrap(text, width).forEach((line) => { y += height; pen.fillText(line, x, y); });
    };
    const tokens = (list) => {
      pen.font = mono(14);
      let x = MARGIN;
      y += 26;
      list.forEach((one) => {
        const wide = pen.measureText(one.text).width;
        if (x + wide > WIDTH - MARGIN && x > MARGIN) { x = MARGIN; y += 25; }
        pen.fillStyle = "rgb(" + colour("--heat") + " / " + 0.62 * (one.heat || 0) + ")";
        pen.fillRect(x - 2, y - 15, wide + 4, 21);
        pen.fillStyle = colour("--ink");
        pen.fillText(one.text, x, y);
        x += wide + 5;
      });
      y += 10;
    };
    const table = (found) => {
      y += 12;
      write(found.name, sans(15, 600), "--ink", 22);
      // The first column of words is the widest.
      const wordy = Math.max(found.columns.findIndex((_, place) => found.rows.some((row) => typeof row[place] === "string" && row[place].length > 24)), 0);
      const narrow = Math.min(120, (WIDTH - 2 * MARGIN) / (found.columns.length + 1));
      const widths = found.columns.map((_, place) => (place === wordy ? WIDTH - 2 * MARGIN - narrow * (found.columns.length - 1) : narrow));
      const line = (cells, font, ink) => {
        const top = y;
        let lowest = y;
        let x = MARGIN;
        cells.forEach((value, place) => {
          y = top;
          write(shown(value), font, ink, 19, x, widths[place] - 12);
          lowest = Math.max(lowest, y);
          x += widths[place];
        });
        y = lowest + 3;
      };
      line(found.columns, sans(12), "--soft");
      found.rows.forEach((row) => line(row, sans(13), "--ink"));
    };
    const draw = () => {
      y = MARGIN;
      write(sheet.title, sans(22, 650), "--ink", 26);
      sheet.facts.forEach((fact) => write(fact, sans(13), "--soft", 19));
      if (sheet.tokens.length) tokens(sheet.tokens);
      sheet.blocks.forEach((block) => {
        y += 12;
        write(block.title, sans(14, 600), "--ink", 21);
        block.text.split("\n").forEach((line) => write(line, mono(13), "--ink", 20));
      });
      sheet.tables.forEach(table);
      y += MARGIN;
    };

    // Once to learn the height, once to keep; a canvas that is too large is not drawn at all.
    canvas.width = WIDTH;
    draw();
    const height = Math.min(Math.ceil(y), 12000);
    canvas.width = 2 * WIDTH;
    canvas.height = 2 * height;
    pen = canvas.getContext("2d");
    pen.scale(2, 2);
    pen.fillStyle = colour("--bg");
    pen.fillRect(0, 0, WIDTH, height);
    draw();
    return new Promise((done) => { canvas.toBlob(done, "image/png"); });
  };

  // Four buttons; the program is shown before it is taken along.
  const bar = (box, sheet) => {
    const program = element("div", "program");
    program.hidden = true;
    const offer = (text, action) => button(text, async () => {
      try { await action(sheet()); } catch (error) { complain(error); }
    }, "", "export as " + text);
    const python = offer("Python", (found) => {
      program.hidden = !program.hidden;
      python.setAttribute("aria-expanded", String(!program.hidden));
      const code = element("pre", "", found.code);
      code.tabIndex = 0;
      code.setAttribute("role", "region");
      code.setAttribute("aria-label", "Python that gives the same numbers");
      program.replaceChildren(element("p", "note", "These lines give the same numbers with the library:"), code,
        button("Download .py", () => save(found.name + ".py", "text/x-python", found.code)));
    });
    python.setAttribute("aria-expanded", "false");
    const row = element("div", "row export");
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", "Export what is seen");
    row.append(element("span", "note", "take along"),
      offer("JSON", (found) => save(found.name + ".json", "application/json", json(found))),
      offer("CSV", (found) => save(found.name + ".csv", "text/csv", csv(found))),
      offer("PNG", async (found) => save(found.name + ".png", "image/png", await picture(found))), python);
    box.replaceChildren(row, program);
  };
  return { bar };
})();
