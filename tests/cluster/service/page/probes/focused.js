// What has the focus: [its mark, whether that can be seen, what it is, whether it is visible]; null: nothing.
() => {
  const e = document.activeElement;
  if (!e || e === document.body) return null;
  if (!e.dataset.seen) e.dataset.seen = Math.random();
  const shown = [e, e.closest(".choice")].filter(Boolean).some((one) => {
    const s = getComputedStyle(one);
    return s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2;
  });
  return [e.dataset.seen, shown, `${e.tagName} ${e.className} ${e.textContent.slice(0, 30)}`, e.checkVisibility()];
};
