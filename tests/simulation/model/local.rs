//! Values of which each task has its own: `std::thread_local`.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::thread::AccessError;

/// A `std::thread::LocalKey`.
pub struct Local<T: 'static>(pub fn() -> T);

type Key = (usize, usize);

thread_local! {
    static VALUES: RefCell<BTreeMap<Key, Rc<dyn Any>>> = const { RefCell::new(BTreeMap::new()) };
}

/// The number of this task; outside of an execution one that no task has.
fn me() -> usize {
    shuttle::current::try_get_current_task().map_or(usize::MAX, usize::from)
}

impl<T: 'static> Local<T> {
    fn value(&'static self) -> Rc<T> {
        let key = (me(), std::ptr::from_ref(self) as usize);
        let known = VALUES.with(|all| all.borrow().get(&key).cloned());
        let value = known.unwrap_or_else(|| {
            let made: Rc<dyn Any> = Rc::new((self.0)());
            VALUES.with(|all| all.borrow_mut().insert(key, Rc::clone(&made)));
            made
        });
        value.downcast().expect("of its key's type")
    }

    pub fn with<R>(&'static self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.value())
    }

    pub fn try_with<R>(&'static self, look: impl FnOnce(&T) -> R) -> Result<R, AccessError> {
        Ok(self.with(look))
    }
}

impl<T: 'static> Local<Cell<T>> {
    pub fn set(&'static self, value: T) {
        self.with(|cell| cell.set(value));
    }

    pub fn replace(&'static self, value: T) -> T {
        self.with(|cell| cell.replace(value))
    }

    pub fn get(&'static self) -> T
    where
        T: Copy,
    {
        self.with(Cell::get)
    }
}

/// The task ends: its values are dropped.
pub(super) fn forget_mine() {
    let me = me();
    loop {
        let next = VALUES.with(|all| {
            let mut all = all.borrow_mut();
            let key = *all.range((me, 0)..=(me, usize::MAX)).next()?.0;
            all.remove(&key)
        });
        if next.is_none() {
            return;
        }
    }
}

/// The execution has ended.
pub(super) fn forget_all() {
    let all = VALUES.with(RefCell::take);
    // What a failed execution has left behind cannot be dropped outside of it.
    std::mem::forget(all);
}

macro_rules! task_local {
    ($($(#[$meta:meta])* static $name:ident: $type:ty = const $init:block;)*) => {
        $($(#[$meta])* static $name: $crate::model::local::Local<$type> = $crate::model::local::Local(|| $init);)*
    };
}
pub(crate) use task_local;
