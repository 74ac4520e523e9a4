// How many stops of the Tab key there must be: controls that can be seen and used; a radio group is one stop.
() => {
  const groups = new Set();
  const all = "a[href], button, input, select, textarea, summary, [tabindex='0']";
  return [...document.querySelectorAll(all)].filter((e) => {
    if (e.disabled || !e.checkVisibility() || e.tabIndex < 0) return false;
    if (e.type !== "radio") return true;
    return !groups.has(e.name) && groups.add(e.name);
  }).length;
};
