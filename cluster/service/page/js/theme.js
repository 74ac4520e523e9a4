// Sets the colors before the first paint; a plain script, since modules run too late for that.
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  function chosen() {
    try {
      return localStorage.getItem("rlhf-theme");
    } catch {
      return null;
    }
  }
  function apply() {
    const theme = chosen() || (dark.matches ? "dark" : "light");
    if (document.documentElement.dataset.theme === theme) return;
    document.documentElement.dataset.theme = theme;
    document.dispatchEvent(new Event("themechange"));
  }
  apply();
  dark.addEventListener("change", apply);
  document.addEventListener("themechosen", apply);
})();
