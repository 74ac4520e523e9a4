type Dependencies = readonly unknown[];
type Update<T> = (next: T | ((old: T) => T)) => void;

export function useState<T>(initial: T | (() => T)): [T, Update<T>];
export function useRef<T>(initial: T): { current: T };
export function useEffect(effect: () => void | (() => void), dependencies?: Dependencies): void;
export function useMemo<T>(make: () => T, dependencies: Dependencies): T;
export function useCallback<T>(callback: T, dependencies: Dependencies): T;
