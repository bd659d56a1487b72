// Shows what of a document survived: the merge tree, the passages that the answer was made from, and
// the document as a heat map. Used by the page and by evidence files; asks nothing of anybody.
"use strict";

const BLOCK_CHARS = 4000;
// Passages that are closer than this are read as one.
const NEAR_CHARS = 40, AROUND_CHARS = 36;

class EvidenceView {
  constructor(root) {
    this.root = root;
  }

  // The request was planned.
  plan(levels, contextTokens) {
    this.starts = null;
    const go = (node) => this.starts && this.scrollTo(this.starts[node.start]);
    this.tree = new MergeTree(levels, contextTokens, go);
    this.root.replaceChildren(this.tree.section);
    this.tree.draw();
  }

  // The answer is there: `evidence` as `homer.v1.Evidence`, `text` the document that it is about.
  show(text, evidence) {
    this.total = evidence.levels[0].context_tokens_in;
    this.plan(evidence.levels.map((level) => level.nodes), this.total);
    this.survived = new Uint8Array(this.total);
    evidence.nodes.forEach((told) => this.tree.node(told));
    evidence.levels.forEach((level, height) => {
      this.tree.levels[height].layers = [level.layer_start, level.layer_end];
      for (const { runs } of this.tree.levels[height].nodes) {
        for (const [start, end] of runs) this.survived.fill(height + 1, start, end);
      }
    });
    this.tree.draw();
    if (!evidence.token_start_steps.length) {
      this.root.append(el("p", { className: "card hint" },
        "The model's tokenizer does not tell where its tokens are in the text, so it cannot be shown."));
      return;
    }
    this.text = text;
    this.place = codePointPlaces(text);
    this.starts = this.tokenStarts(evidence.token_start_steps);
    this.root.append(this.passageSection(evidence.passages), this.mapSection());
  }

  // ---- the document

  // Where each token starts in the text, and the end of the last, as JavaScript counts.
  tokenStarts(steps) {
    let at = 0;
    const starts = Uint32Array.from(steps, (step) => this.place(at += step));
    return [...starts, this.text.length];
  }

  mapSection() {
    this.pane = el("div", { className: "text", tabIndex: 0, id: "map" });
    this.pane.setAttribute("role", "region");
    this.pane.setAttribute("aria-label", "The document; what survived is marked");
    const seen = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting) this.paint(target.block);
      }
    }, { root: this.pane, rootMargin: "1000px" });
    this.blocks = [];
    const { starts } = this, last = starts.length - 1;
    for (let from = 0; from < last;) {
      let to = from + 1;
      while (to < last && !this.endsBlock(starts[to], starts[to] - starts[from])) to += 1;
      // Tokens of one character stay together.
      while (to < last && starts[to] === starts[to - 1]) to += 1;
      const begin = from ? starts[from] : 0;
      const div = el("div", { className: "block" }, this.text.slice(begin, starts[to]));
      div.block = { div, from, to, begin, end: starts[to], painted: false };
      this.blocks.push(div.block);
      this.pane.append(div);
      seen.observe(div);
      from = to;
    }
    this.pane.addEventListener("click", (event) => {
      const mark = event.target.closest("mark");
      if (mark) this.choosePassage(Number(mark.dataset.group), false);
    });
    return el("section", { className: "card map" }, el("h2", {}, "The document"),
      el("p", { className: "hint" }, "The stronger a word is marked, the higher it rose in the tree. " +
        "What is marked in full is in the final cache."), this.pane);
  }

  // A block is a paragraph to the browser: it ends where the text has a line's end, or else a sentence's.
  endsBlock(at, chars) {
    const before = this.text[at - 1];
    return chars >= BLOCK_CHARS && before === "\n" ||
      chars >= 2 * BLOCK_CHARS && /[.!?…。]/.test(before) || chars >= 4 * BLOCK_CHARS;
  }

  // Put marks into a block that comes into view.
  paint(block) {
    if (block.painted) return;
    block.painted = true;
    const parts = [], { starts, survived } = this, top = this.tree.levels.length;
    let text = this.text.slice(block.begin, starts[block.from]), level = 0, group = -1;
    const flush = () => {
      if (!text) return;
      if (level === top) {
        const mark = el("mark", { title: `tokens that the answer was made from, part ${group + 1}` }, text);
        mark.dataset.group = group;
        parts.push(mark);
      } else if (level) {
        const span = el("span", {}, text);
        span.style.setProperty("--heat", (0.3 * level / top).toFixed(3));
        parts.push(span);
      } else parts.push(text);
      text = "";
    };
    let carried = 0;
    for (let token = block.from; token < block.to; token++) {
      const now = Math.max(carried, survived[token]);
      const piece = this.text.slice(starts[token], starts[token + 1]);
      // A token within a character: what is true of it is true of the character.
      carried = piece ? 0 : now;
      if (!piece) continue;
      const mine = now === top ? this.groupOf(token) : -1;
      if (now !== level || mine !== group) flush();
      [level, group] = [now, mine];
      text += piece;
    }
    flush();
    block.div.replaceChildren(...parts);
  }

  scrollTo(place) {
    const block = this.blocks.find(({ end }) => place < end) ?? this.blocks.at(-1);
    this.paint(block);
    const range = document.createRange();
    const walker = document.createTreeWalker(block.div, NodeFilter.SHOW_TEXT);
    let left = place - block.begin;
    while (walker.nextNode()) {
      if (left < walker.currentNode.length) break;
      left -= walker.currentNode.length;
    }
    range.setStart(walker.currentNode, left);
    range.setEnd(walker.currentNode, left + 1);
    this.pane.scrollIntoView({ block: "nearest" });
    const shift = range.getBoundingClientRect().top - this.pane.getBoundingClientRect().top;
    this.pane.scrollTop += shift - this.pane.clientHeight / 3;
  }

  // ---- the passages

  passageSection(passages) {
    const { place } = this;
    this.groups = [];
    for (const told of passages) {
      const one = {
        from: told.token_start, to: told.token_end,
        start: place(told.char_start), end: place(told.char_end),
      };
      const last = this.groups.at(-1)?.at(-1);
      if (last && one.start - last.end <= NEAR_CHARS) this.groups.at(-1).push(one);
      else this.groups.push([one]);
    }
    this.firstTokens = this.groups.map((group) => group[0].from);
    this.list = el("ol", { id: "passages" }, ...this.groups.map((group, i) => {
      const at = `${(100 * group[0].start / this.text.length).toFixed(1)} %`;
      const button = el("button", { type: "button" },
        el("span", { className: "at" }, at), this.words(group));
      button.addEventListener("click", () => this.choosePassage(i, true));
      return el("li", {}, button);
    }));
    const tokens = passages.reduce((sum, one) => sum + one.token_end - one.token_start, 0);
    return el("section", { className: "card passages" },
      el("h2", {}, "What the answer was made from"),
      el("p", { className: "hint" }, `${count(tokens)} of ${count(this.total)} tokens, in the order ` +
        "of the document and with their place in it. Choose one to find it there."), this.list);
  }

  // The words of a group, with what is around and between them.
  words(group) {
    const { text } = this, faint = (from, to, cut = "") => el("span", { className: "around" },
      text.slice(from, to).replace(cut, "").replace(/\s+/g, " "));
    const first = group[0].start, end = group.at(-1).end, out = el("span", { className: "words" });
    // What is around begins and ends with a whole word.
    const from = first - AROUND_CHARS, to = end + AROUND_CHARS;
    out.append(faint(Math.max(0, from), first, from > 0 ? /^\S*\s+/ : /^\s+/));
    group.forEach((one, i) => {
      if (i) out.append(faint(group[i - 1].end, one.start));
      const kept = text.slice(Math.max(one.start, group[i - 1]?.end ?? 0), one.end);
      // The space before a word belongs to its token, and is not worth a mark.
      const [space] = kept.match(/^\s*(?=\S)/) ?? [""];
      out.append(space && " ", el("b", {}, kept.slice(space.length)));
    });
    out.append(faint(end, to, to < text.length ? /\s+\S*$/ : /\s+$/));
    return out;
  }

  groupOf(token) {
    let low = 0, high = this.firstTokens.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.firstTokens[middle] <= token) low = middle; else high = middle;
    }
    return low;
  }

  choosePassage(group, fromList) {
    this.root.querySelectorAll(".chosen").forEach((one) => one.classList.remove("chosen"));
    const button = this.list.children[group].firstChild;
    button.classList.add("chosen");
    if (fromList) this.scrollTo(this.groups[group][0].start);
    else button.scrollIntoView({ block: "nearest" });
    this.pane.querySelectorAll(`mark[data-group="${group}"]`)
      .forEach((mark) => mark.classList.add("chosen"));
  }
}

// The service counts code points, JavaScript counts twice what is beyond U+FFFF.
function codePointPlaces(text) {
  const wide = [];
  let points = 0;
  if (/[\ud800-\udbff]/.test(text)) {
    for (const character of text) {
      if (character.length === 2) wide.push(points);
      points += 1;
    }
  }
  return (point) => {
    let low = 0, high = wide.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (wide[middle] < point) low = middle + 1; else high = middle;
    }
    return point + low;
  };
}
